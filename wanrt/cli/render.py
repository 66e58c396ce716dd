"""`wanrt render`: a prompt file, or a prompt, to a video file."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli import _options as option


def command(
    context: typer.Context,
    prompt: option.Prompt,
    output: Annotated[
        option.Text,
        typer.Option(
            "--output", "-o", metavar="FILE", help="What to write: .mp4 .mkv .mov .webm .gif, %d.png."
        ),
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
    """Render a prompt file, or a prompt, to a video file."""
    import sys

    from wanrt.cli import _joined
    from wanrt.cli._talk import observing, panel_mode
    from wanrt.script import build_job, read_script

    mode = panel_mode(quiet=quiet, plain=plain, json_progress=json_progress)
    with _joined.crew() as crew:
        job = build_job(read_script(prompt, sys.stdin.buffer), {**option.making(context), "output": output})
        with observing(mode) as observer:
            from wanrt.pipeline import render

            result = render(job, observer, started_ns=context.obj, crew=crew)
    print(result.output)
