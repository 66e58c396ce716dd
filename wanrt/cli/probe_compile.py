"""`wanrt probe-compile`: what torch.compile does to a transformer here, and why it gains what it gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    preset: Annotated[
        str, typer.Option("--preset", metavar="NAME", help="The model (wanrt presets lists them).")
    ] = "wan-tiny",
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Width x height, multiples of 16.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", metavar="N", help="Take only so many of the model's layers.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="TYPE", help="auto, bf16, fp16 or fp32.")
    ] = "auto",
    attention: Annotated[
        str,
        typer.Option(
            "--attention", metavar="NAME", help="auto, sdpa, cudnn, flash, fa4, hopper, triton or math."
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    backend: Annotated[
        str,
        typer.Option("--backend", metavar="NAME", help="inductor; or aot_eager, eager: nothing is fused."),
    ] = "inductor",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the random weights.")] = 0,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers there, too.")
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Explain two --json files' different gains instead."),
    ] = None,
) -> None:
    """Ask what torch.compile does to a transformer, and why it gains what it gains."""
    from wanrt.pipeline.devices import wait_passively

    wait_passively()  # before torch is imported
    from wanrt.probes.compile_command import Request, run

    run(
        Request(
            preset=preset,
            size=size,
            layers=layers,
            precision=precision,
            attention=attention,
            device=device,
            backend=backend,
            seed=seed,
            json=json,
            compare=compare,
        )
    )
