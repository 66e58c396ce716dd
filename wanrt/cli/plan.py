"""`wanrt plan`: what a job would do to a machine, before anything loads."""

from __future__ import annotations

from typing import Annotated

import typer

Text = str | None


def command(
    prompt: Annotated[
        Text,
        typer.Argument(metavar="[FILE]", help='A prompt file, "-" for stdin, or a demo; or give --preset.'),
    ] = None,
    preset: Annotated[
        Text, typer.Option(metavar="NAME", help="The model (wanrt presets lists them).")
    ] = None,
    size: Annotated[Text, typer.Option(metavar="WxH", help="Width x height, multiples of 16.")] = None,
    topology: Annotated[Text, typer.Option(metavar="T", help="Devices and roles; default auto.")] = "auto",
    anchor: Annotated[
        Text, typer.Option(metavar="POLICY", help="An anchor policy; see wanrt-render.")
    ] = None,
    window: Annotated[Text, typer.Option(metavar="N", help="Latent frames of context.")] = None,
    steps: Annotated[Text, typer.Option(metavar="LIST", help="How many steps, or their timesteps.")] = None,
    precision: Annotated[Text, typer.Option(metavar="P", help="auto, bf16, fp16, fp32 or fp8.")] = None,
    devices: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="Plan for N devices instead of those here.")
    ] = None,
    gpu: Annotated[
        Text, typer.Option(metavar="NAME", help="Plan for this kind of GPU, such as H200.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", min=0.5, help="Memory of each device.")
    ] = None,
    link: Annotated[
        Text, typer.Option(metavar="LINK", help="nvlink, or host for boards without P2P.")
    ] = None,
    costs: Annotated[
        Text,
        typer.Option(metavar="FILE", help="Stage costs from a --json file of wanrt bench on one device."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show devices, roles, memory, traffic and predicted speed, without loading weights."""
    import json as encoding

    from wanrt.parallel.report import as_json, find_machine, make_plan, read_costs, text
    from wanrt.script import build_job, read_script

    flags = {
        "preset": preset, "size": size, "topology": topology, "anchor": anchor, "window": window, "steps": steps,
        "precision": precision,
    }  # fmt: skip
    script = read_script("a plan needs no prompt" if prompt is None else prompt)
    job = build_job(script, {key: value for key, value in flags.items() if value is not None})
    plan = make_plan(
        job, find_machine(devices, gpu, link, memory), None if costs is None else read_costs(costs)
    )
    print(encoding.dumps(as_json(plan), indent=2) if json else text(plan))
