"""`wanrt render`: a prompt file, or a prompt, to a video file."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.cli._talk import preset_words

# Values arrive as text and are checked together with the file's, so that all mistakes are reported at once.
Text = str | None


def command(
    context: typer.Context,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="FILE|PROMPT", help='A prompt file, "-" for stdin, a demo, or a prompt in quotes.'
        ),
    ],
    output: Annotated[
        Text,
        typer.Option(
            "--output", "-o", metavar="FILE", help="What to write: .mp4 .mkv .mov .webm .gif, %d.png."
        ),
    ] = None,
    preset: Annotated[
        Text,
        typer.Option(
            metavar="NAME", help="The model (wanrt presets lists them).", autocompletion=preset_words
        ),
    ] = None,
    seed: Annotated[Text, typer.Option(metavar="N", help="The same seed makes the same video.")] = None,
    size: Annotated[Text, typer.Option(metavar="WxH", help="Width x height, multiples of 16.")] = None,
    fps: Annotated[Text, typer.Option(metavar="N", help="Frames per second of the video.")] = None,
    duration: Annotated[Text, typer.Option(metavar="TIME", help="Length, such as 5s or 1m30s.")] = None,
    chunks: Annotated[
        Text, typer.Option(metavar="N", help="Length in chunks (9 frames, then 12 each).")
    ] = None,
    topology: Annotated[
        Text, typer.Option(metavar="T", help="Devices and roles: single, tp=2, pp1+tp=4.")
    ] = None,
    anchor: Annotated[
        Text, typer.Option(metavar="POLICY", help="decode-all, overlap, anchor-only, latent or first-frame.")
    ] = None,
    window: Annotated[Text, typer.Option(metavar="N", help="Latent frames of context.")] = None,
    bias: Annotated[
        Text, typer.Option(metavar="B", help="KV attention bias, above 0 to 1; 1 is off.")
    ] = None,
    steps: Annotated[
        Text, typer.Option(metavar="LIST", help="How many steps, or timesteps: 1000,937,833,625.")
    ] = None,
    precision: Annotated[Text, typer.Option(metavar="P", help="auto, bf16, fp16, fp32 or fp8.")] = None,
    device: Annotated[Text, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.")] = None,
    weights: Annotated[Text, typer.Option(metavar="DIR", help="Where the weights are.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Fill the model with noise: for benchmarks only.")
    ] = False,
    codec: Annotated[Text, typer.Option(metavar="C", help="h264, hevc, av1 or vp9.")] = None,
    quality: Annotated[Text, typer.Option(metavar="Q", help="0 (small) to 100 (best), or crf=N.")] = None,
    stats: Annotated[Text, typer.Option(metavar="FILE", help="Write timing statistics as JSON.")] = None,
    trace: Annotated[Text, typer.Option(metavar="FILE", help="Write a trace for Perfetto or Chrome.")] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print plain lines, no panel.")] = False,
    json_progress: Annotated[
        bool, typer.Option("--json-progress", help="Print progress as JSON lines.")
    ] = False,
) -> None:
    """Render a prompt file, or a prompt, to a video file."""
    import sys

    from wanrt.cli._talk import observing, panel_mode
    from wanrt.script import build_job, read_script

    mode = panel_mode(quiet=quiet, plain=plain, json_progress=json_progress)
    flags = {
        "output": output, "preset": preset, "seed": seed, "size": size, "fps": fps, "duration": duration,
        "chunks": chunks, "topology": topology, "anchor": anchor, "window": window, "bias": bias, "steps": steps,
        "precision": precision, "device": device, "weights": weights, "random_weights": random_weights,
        "codec": codec, "quality": quality, "stats": stats, "trace": trace, "force": force,
    }  # fmt: skip
    job = build_job(read_script(prompt, sys.stdin.buffer), flags)
    with observing(mode) as observer:
        from wanrt.pipeline import render

        result = render(job, observer, started_ns=context.obj)
    print(result.output)
