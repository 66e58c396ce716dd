"""`wanrt probe-vae`: what a VAE can do on its own, answered by experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    vae: Annotated[
        str,
        typer.Option(
            "--vae",
            metavar="VAE",
            help="wan-tiny, wan, lightvae, taehv, a preset, a checkpoint, or diffusers:CLASS.",
        ),
    ] = "wan-tiny",
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            metavar="LIST",
            help="Some of t1, causality, receptive-field, workarounds, timing, anchor.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one self-contained page with plots.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Compare the video VAEs of diffusers instead, one row each.")
    ] = False,
    into: Annotated[
        Path | None,
        typer.Option("--into", metavar="FILE", help="With --all: put the table between a page's markers."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="DIR", help="Look for weights here too, first.")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Random weights even where real ones are found.")
    ] = False,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="Picture size for the question about time.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="TYPE", help="fp32, bf16, fp16 or fp64.")
    ] = "fp32",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of random weights.")] = 0,
) -> None:
    """Ask a video VAE, by experiment, what it can decode alone and what that costs."""
    from wanrt.pipeline.devices import wait_passively

    wait_passively()  # before torch is imported
    from wanrt.probes.vae_command import Request, run

    run(
        Request(
            vae=vae,
            only=only,
            json=json,
            html=html,
            every=every,
            into=into,
            weights=weights,
            random_weights=random_weights,
            size=size,
            precision=precision,
            device=device,
            seed=seed,
        )
    )
