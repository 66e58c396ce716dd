"""A job's pipeline, on one device or over several: the one place that knows both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wanrt.pipeline.build import Tuning, Wiring, join, topology_of
from wanrt.pipeline.loop import Pipeline

if TYPE_CHECKING:
    import torch

    from wanrt.script import RenderJob
    from wanrt.weights.registry import ModelFiles


def build_pipeline(
    job: RenderJob,
    files: ModelFiles | None,
    device: torch.device,
    wiring: Wiring,
    tuning: Tuning | None = None,
) -> Pipeline:
    """Loads the models of `job` and joins them. `files` as `find_files` gave them.

    With a topology of several devices, `device` is the first; the other ranks are started, and end with
    `Pipeline.close`. Raises `WeightsError` for foreign or damaged checkpoints, `RunError` for a rank that fails.
    """
    topology, tuning = topology_of(job), tuning or Tuning()
    if not topology.distributed:
        return _on_one_device(job, files, device, wiring, tuning)
    from wanrt.pipeline.ranks import build_ranked

    if wiring.shelf is not None:
        wiring.shelf.clear()  # ranks load their own shares
    return build_ranked(job, files, device, topology, wiring, tuning)


def _on_one_device(
    job: RenderJob, files: ModelFiles | None, device: torch.device, wiring: Wiring, tuning: Tuning
) -> Pipeline:
    from wanrt.pipeline.devices import choose_precision
    from wanrt.pipeline.shelf import Shelf

    precision, shelf = choose_precision(job.precision, device), wiring.shelf or Shelf()
    models = shelf.stage0(job, files, device, precision, wiring.loading)
    transformer = shelf.transformer(
        job, files, device, precision, wiring.loading, compiled=tuning.compile and device.type == "cuda"
    )
    return join(job, models, transformer, device, wiring, tuning)
