"""Models that stay loaded between the runs of one process, for the next run that needs the very same."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from wanrt.pipeline.devices import Precision
from wanrt.pipeline.models import Stage0Models, load_stage0, load_transformer
from wanrt.pipeline.progress import Progress

if TYPE_CHECKING:
    import torch

    from wanrt.models.transformer import WanTransformer
    from wanrt.script import RenderJob
    from wanrt.weights.registry import ModelFiles

log = logging.getLogger("wanrt.pipeline")

Model = TypeVar("Model")


class Shelf:
    """The models of the latest run on one device: weights alone, which no run changes.

    At most one of each kind is held, and the old one is gone before another is loaded. Size, window, steps, anchor and
    prompts are no part of a model; what a run makes of them (caches, graphs, the VAE as a GPU runs it) is its own.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def stage0(
        self,
        job: RenderJob,
        files: ModelFiles | None,
        device: torch.device,
        precision: Precision,
        progress: Progress,
    ) -> Stage0Models:
        """As `load_stage0`, unless the latest run had the same."""
        same = (*_origin(job, files, device), precision.vae, precision.text)
        return self._take("VAE", same, lambda: load_stage0(job, files, device, precision, progress))

    def transformer(
        self,
        job: RenderJob,
        files: ModelFiles | None,
        device: torch.device,
        precision: Precision,
        progress: Progress,
        *,
        compiled: bool,
    ) -> WanTransformer:
        """As `load_transformer`, unless the latest run had the same. `compiled`: it will be, in place: another one."""
        kind = (precision.transformer, precision.fp8, job.attention)
        same = (*_origin(job, files, device), *kind, compiled)
        return self._take(
            "transformer", same, lambda: load_transformer(job, files, device, precision, progress)
        )

    def clear(self) -> None:
        """Gives the models up, and on CUDA the memory of runs that are over back to the device."""
        self._held.clear()
        give_back()

    def _take(self, kind: str, same: tuple[Any, ...], load: Callable[[], Model]) -> Model:
        held = self._held.pop(kind, None)
        if held is not None and held[0] == same:
            log.info("%s: that of the run before", kind)
            self._held[kind] = held
            return held[1]
        del held
        give_back()
        model = load()
        self._held[kind] = same, model
        return model


def _origin(job: RenderJob, files: ModelFiles | None, device: torch.device) -> tuple[Any, ...]:
    """What a model is made of: preset and files, or preset and the seed of its noise; and where."""
    return job.preset, files, job.seed if files is None else None, device


def give_back() -> None:
    """Frees what runs that are over have left; without CUDA that is Python's garbage alone."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
