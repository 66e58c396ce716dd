"""`wanrt bench`: how fast a model runs here."""

from __future__ import annotations

from typing import Annotated

import typer

from wanrt.errors import UsageError

Text = str | None


def command(
    context: typer.Context,
    preset: Annotated[
        Text, typer.Option(metavar="NAME", help="The model (wanrt presets lists them).")
    ] = None,
    size: Annotated[Text, typer.Option(metavar="WxH", help="Width x height, multiples of 16.")] = None,
    chunks: Annotated[int, typer.Option(metavar="N", help="Chunks to measure, after the warm-up.")] = 8,
    warm_up: Annotated[int, typer.Option(metavar="N", help="Chunks before the measurement.")] = 3,
    topology: Annotated[Text, typer.Option(metavar="T", help="Devices and roles; see wanrt-render.")] = None,
    anchor: Annotated[
        Text, typer.Option(metavar="POLICY", help='An anchor policy, several with commas, or "all".')
    ] = None,
    matrix: Annotated[
        Text,
        typer.Option(
            metavar="LIST", help="TOPOLOGY[:ANCHOR]..., several with commas; or two, four, eight, seed, vae."
        ),
    ] = None,
    window: Annotated[Text, typer.Option(metavar="N", help="Latent frames of context.")] = None,
    bias: Annotated[
        Text, typer.Option(metavar="B", help="KV attention bias, above 0 to 1; 1 is off.")
    ] = None,
    steps: Annotated[Text, typer.Option(metavar="LIST", help="How many steps, or their timesteps.")] = None,
    precision: Annotated[Text, typer.Option(metavar="P", help="auto, bf16, fp16, fp32 or fp8.")] = None,
    attention: Annotated[
        Text, typer.Option(metavar="NAME", help="auto, sdpa, cudnn, flash, fa4, hopper, triton or math.")
    ] = None,
    device: Annotated[Text, typer.Option(metavar="D", help="auto, cpu, cuda or cuda:N.")] = None,
    weights: Annotated[Text, typer.Option(metavar="DIR", help="Where the weights are.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Fill the model with noise; times are the same.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the transformer's layers (CUDA).")
    ] = False,
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Run steady passes as CUDA graphs.")
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Measure no time but the precision's error, step by step.")
    ] = False,
    vae: Annotated[
        bool,
        typer.Option("--vae", help="Measure the VAE's calls alone, beside other implementations of them."),
    ] = False,
    json: Annotated[
        Text, typer.Option("--json", metavar="FILE", help="Write the measurements there.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1, help="Stop when this much time is used up.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Measure only what the --json file lacks.")
    ] = False,
) -> None:
    """Measure how fast a model runs here, in its steady state."""
    from wanrt.cli import _joined
    from wanrt.panel import make_observer
    from wanrt.pipeline.bench import run_bench
    from wanrt.pipeline.build import Tuning
    from wanrt.pipeline.campaign import Campaign, run_campaign
    from wanrt.pipeline.check import run_check
    from wanrt.pipeline.matrix import entries_of, needs_own_process

    flags = {
        "preset": preset, "size": size, "topology": topology, "window": window, "bias": bias, "steps": steps,
        "precision": precision, "attention": attention, "device": device, "weights": weights,
        "random_weights": random_weights,
    }  # fmt: skip
    if vae:
        _refuse_beside_vae(
            matrix=matrix, topology=topology, anchor=anchor, check=check, window=window, bias=bias, steps=steps,
            attention=attention, weights=weights, compile=compile, budget=budget, resume=resume,
        )  # fmt: skip
        from wanrt.probes.vae_race import run_race

        print(run_race(flags, chunks, warm_up, json, graphs=graphs))
        return
    tuning = Tuning(graphs, compile)
    if check:
        if matrix is not None:
            raise UsageError("--check with --matrix: expected one configuration; leave out --matrix")
        print(run_check({**flags, "anchor": anchor}, chunks, tuning, json))
        return
    say = make_observer("plain").log
    with _joined.crew() as crew:
        entries = entries_of(anchor, matrix, size, precision)
        apart = budget is not None or resume or any(needs_own_process(entry) for entry in entries)
        if apart and crew is None:
            campaign = Campaign(flags, chunks, warm_up, tuning, json, budget, resume, say)
            print(run_campaign(campaign, entries))
        else:
            print(run_bench(flags, entries, chunks, warm_up, tuning, json, crew, say, context.obj))


def _refuse_beside_vae(**options: object) -> None:
    given = ", ".join(f"--{name}" for name, value in options.items() if value)
    if given:
        raise UsageError(f"--vae with {given}: expected the VAE alone, on one device; leave out {given}")
