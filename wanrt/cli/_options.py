"""Options that commands share, in one table: what is made, with what, and how it is shown.

Values arrive as text and are checked together with the file's, so that all mistakes are reported at once.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from wanrt.cli._talk import attention_words, preset_words

Text = str | None

Prompt = Annotated[
    str,
    typer.Argument(
        metavar="FILE|PROMPT", help='A prompt file, "-" for stdin, a demo, or a prompt in quotes.'
    ),
]
Preset = Annotated[
    Text,
    typer.Option(metavar="NAME", help="The model (wanrt presets lists them).", autocompletion=preset_words),
]
Seed = Annotated[Text, typer.Option(metavar="N", help="The same seed makes the same video.")]
Size = Annotated[Text, typer.Option(metavar="WxH", help="Width x height, multiples of 16.")]
Fps = Annotated[Text, typer.Option(metavar="N", help="Frames per second of the video.")]
Duration = Annotated[Text, typer.Option(metavar="TIME", help="Length, such as 5s or 1m30s.")]
Chunks = Annotated[Text, typer.Option(metavar="N", help="Length in chunks (9 frames, then 12 each).")]
Topology = Annotated[Text, typer.Option(metavar="T", help="Devices and roles: single, tp=2, pp1+tp=4.")]
Anchor = Annotated[
    Text, typer.Option(metavar="POLICY", help="decode-all, overlap, anchor-only, latent or first-frame.")
]
Window = Annotated[Text, typer.Option(metavar="N", help="Latent frames of context.")]
Bias = Annotated[Text, typer.Option(metavar="B", help="KV attention bias, above 0 to 1; 1 is off.")]
Steps = Annotated[Text, typer.Option(metavar="LIST", help="How many steps, or timesteps: 1000,937,833,625.")]
Precision = Annotated[Text, typer.Option(metavar="P", help="auto, bf16, fp16, fp32 or fp8.")]
Attention = Annotated[
    Text,
    typer.Option(
        metavar="NAME",
        help="auto, sdpa, cudnn, flash, fa4, hopper, triton or math.",
        autocompletion=attention_words,
    ),
]
Device = Annotated[Text, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.")]
Weights = Annotated[Text, typer.Option(metavar="DIR", help="Where the weights are.")]
RandomWeights = Annotated[
    bool, typer.Option("--random-weights", help="Fill the model with noise: for benchmarks only.")
]
Codec = Annotated[Text, typer.Option(metavar="C", help="h264, hevc, av1 or vp9.")]
Quality = Annotated[Text, typer.Option(metavar="Q", help="0 (small) to 100 (best), or crf=N.")]
Stats = Annotated[Text, typer.Option(metavar="FILE", help="Write timing statistics as JSON.")]
Trace = Annotated[Text, typer.Option(metavar="FILE", help="Write a trace for Perfetto or Chrome.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print plain lines, no panel.")]
JsonProgress = Annotated[bool, typer.Option("--json-progress", help="Print progress as JSON lines.")]
Run = Annotated[Text, typer.Option(metavar="NAME", help="Which run; without it the only one.")]

MAKING = (
    "preset", "seed", "size", "fps", "duration", "chunks", "topology", "anchor", "window", "bias", "steps",
    "precision", "attention", "device", "weights", "random_weights", "codec", "quality", "stats", "trace", "force",
)  # fmt: skip


def making(context: typer.Context) -> dict[str, Any]:
    """What was given for the options that say what is made, by name: the flags of `build_job`."""
    return {name: context.params[name] for name in MAKING}
