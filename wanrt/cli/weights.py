"""`wanrt weights`: what is on this disk, what is missing, how to get it, and other names for it."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

command = typer.Typer(
    help="Find, check, pull and convert model weights.",
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights", metavar="DIR", help="Weights directory, in place of WANRT_WEIGHTS or the default."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


class Names(StrEnum):
    """Naming schemes of `convert`."""

    ORIGINAL = "original"
    DIFFUSERS = "diffusers"
    TRANSFORMERS = "transformers"


class Dtype(StrEnum):
    """Dtypes of `convert`."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


@command.command("list")
def list_presets(weights: Weights = None, as_json: Json = False) -> None:
    """List the presets and where their weights are."""
    from wanrt.weights import survey
    from wanrt.weights.registry import search_directories

    ready = [survey.readiness(preset, weights) for preset in survey.presets()]
    text = survey.list_text(ready, search_directories(weights))
    print(json.dumps(survey.as_data([], ready), indent=2) if as_json else text)


@command.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A weights directory, or one checkpoint.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every tensor and look for NaN and Inf.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a directory holds, and what is missing for which preset."""
    from wanrt.errors import WeightsError
    from wanrt.weights import survey

    held = survey.survey(directory, deep=deep)
    ready = [survey.readiness(p, directory, held) for p in survey.presets()] if directory.is_dir() else []
    report = survey.as_data(held, ready)
    print(json.dumps(report, indent=2) if as_json else survey.check_text(held, ready))
    if bad := [item.path for item in held if item.error]:
        raise WeightsError(f"{len(bad)} of {len(held)} files cannot be used: {', '.join(bad[:4])}")


@command.command()
def pull(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A preset, or a preset's .toml file.")],
    weights: Weights = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fetch the weights of a preset from the hub; what is there stays, what broke off is resumed."""
    from wanrt.script.preset import load_preset
    from wanrt.weights.hub import pull_preset
    from wanrt.weights.registry import weights_directory

    files = pull_preset(load_preset(name), weights_directory(weights), None if quiet else _say)
    for part, path in files.items():
        print(f"{part.replace('_', ' ')}: {path}")


@command.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A checkpoint of any public format.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="A .safetensors file, or a directory for shards.")
    ],
    names: Annotated[
        Names | None, typer.Option("--names", help="Names of the tensors; default: as they are.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Precision; default: as it is.")] = None,
    lora: Annotated[Path | None, typer.Option("--lora", metavar="FILE", help="A LoRA to merge in.")] = None,
    shard_size: Annotated[
        float, typer.Option("--shard-size", metavar="GB", min=0.001, help="Size of a shard.")
    ] = 5.0,
    force: Annotated[bool, typer.Option("--force", "-f", help="Overwrite.")] = False,
) -> None:
    """Rewrite a checkpoint as safetensors: other names, other precision, one file or shards."""
    import torch

    from wanrt.weights.checkpoint import open_checkpoint
    from wanrt.weights.convert import convert as rewrite
    from wanrt.weights.loading import open_transformer
    from wanrt.weights.names import Naming

    dtypes = {Dtype.BF16: torch.bfloat16, Dtype.FP16: torch.float16, Dtype.FP32: torch.float32}
    written = rewrite(
        open_transformer(source, lora) if lora else open_checkpoint(source),
        target,
        naming=Naming(names) if names else None,
        dtype=dtypes[dtype] if dtype else None,
        shard_bytes=int(shard_size * 1e9),
        force=force,
    )
    print(f"{written}: {open_checkpoint(written).describe()}")


def _say(line: str) -> None:
    print(f"wanrt: {line}", file=sys.stderr, flush=True)
