"""`wanrt stream`: a prompt file, or a prompt, live to servers, folders, files and a page."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
import typer.core

from wanrt.cli import _options as option

PLACE = re.compile(r"\d{1,5}|[^\s:/]+:\d{1,5}")


class Parser(typer.core.TyperCommand):
    """Reads `--serve` with or without a port behind it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Any free port where none is given."""
        for at, word in enumerate(args):
            if word == "--":
                break
            if word == "--serve" and not PLACE.fullmatch("".join(args[at + 1 : at + 2])):
                args = [*args[:at], "--serve=0", *args[at + 1 :]]
        return super().parse_args(ctx, args)


def command(
    context: typer.Context,
    prompt: option.Prompt,
    rtmp: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="rtmp://HOST/APP/KEY, or rtmps; may be repeated.")
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="TARGET",
            help="Also there: a URL, LIST.m3u8, FILE.mp4; may be repeated.",
        ),
    ] = None,
    serve: Annotated[
        option.Text, typer.Option(metavar="[PORT]", help="Show it on a web page of this machine.")
    ] = None,
    latency: Annotated[
        str, typer.Option(metavar="TIME", help="How much video may wait before it is shown.")
    ] = "2s",
    pace: Annotated[
        str, typer.Option(metavar="HOW", help="When generation is slower: repeat, slow or blend.")
    ] = "repeat",
    watch: Annotated[
        bool, typer.Option("--watch", help="Read the prompt file again when it is saved.")
    ] = False,
    endless: Annotated[
        bool, typer.Option("--endless", help="Go on after the file's duration, with its last scene.")
    ] = False,
    name: Annotated[
        option.Text, typer.Option(metavar="NAME", help="The run's name, for wanrt say and others.")
    ] = None,
    preset: option.Preset = None,
    seed: option.Seed = None,
    size: option.Size = None,
    fps: option.Fps = None,
    duration: option.Duration = None,
    chunks: option.Chunks = None,
    topology: option.Topology = None,
    anchor: option.Anchor = None,
    window: option.Window = None,
    bias: option.Bias = None,
    steps: option.Steps = None,
    precision: option.Precision = None,
    attention: option.Attention = None,
    device: option.Device = None,
    weights: option.Weights = None,
    random_weights: option.RandomWeights = False,
    codec: option.Codec = None,
    quality: option.Quality = None,
    stats: option.Stats = None,
    trace: option.Trace = None,
    force: option.Force = False,
    quiet: option.Quiet = False,
    plain: option.Plain = False,
    json_progress: option.JsonProgress = False,
) -> None:
    """Stream a prompt file, or a prompt, live; steer it with wanrt say, set, seed, pause and stop."""
    import sys

    from wanrt.cli import _joined
    from wanrt.cli._talk import observing, panel_mode
    from wanrt.script.live import plan_stream

    mode = panel_mode(quiet=quiet, plain=plain, json_progress=json_progress)
    with _joined.crew() as crew:
        job, plan = plan_stream(
            prompt, option.making(context), sys.stdin.buffer, rtmp=rtmp or (), outputs=output or (), serve=serve,
            latency=latency, pace=pace, watch=watch, endless=endless, name=name,
        )  # fmt: skip
        with observing(mode) as observer:
            from wanrt.pipeline.stream import stream

            def announce(address: str) -> None:
                print(address, flush=True)  # a result, whatever --quiet
                if not sys.stdout.isatty():
                    observer.log(f"page: {address}")

            result = stream(job, plan, observer, started_ns=context.obj, announce=announce, crew=crew)
    for shown in result.outputs:
        print(shown)
