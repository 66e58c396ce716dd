"""What `wanrt probe-compile` examines: a transformer of a preset's shape, its cache, and the passes of a chunk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch._dynamo
import torch._inductor.config

from wanrt.errors import RunError, UsageError
from wanrt.models.attention import AttentionBackend
from wanrt.models.kv_cache import CachePolicy, KVCache, Pass, PassPlan
from wanrt.models.memory import LOCAL, Elementwise
from wanrt.models.transformer import TextKV, TimeEmbedding, WanTransformer
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.models import compile_blocks, hashed_embedding, join_products
from wanrt.script.preset import Preset
from wanrt.weights.loading import build_on_meta
from wanrt.weights.random import random_weights
from wanrt_kernels.adaln import HAVE_TRITON, add_norm_ref
from wanrt_kernels.rope_norm import rope_norm_ref

log = logging.getLogger("wanrt.probes")

PLAIN = Elementwise(add_norm_ref, rope_norm_ref)


@dataclass(frozen=True)
class Variant:
    """One way to run the same transformer."""

    path: str  # "plain": PyTorch between products; "own": wanrt's kernels
    compiled: bool

    @property
    def name(self) -> str:
        """As in tables."""
        return f"{self.path} {'compiled' if self.compiled else 'eager'}"

    @property
    def ops(self) -> Elementwise:
        """What runs between products."""
        return PLAIN if self.path == "plain" else LOCAL


@dataclass
class CompileSubject:
    """A transformer with random weights on a device, and everything a steady chunk needs.

    `latents` `[1, 16, 3, h, w]` serve chunk and context alike.
    """

    preset: Preset
    size: tuple[int, int]
    backend: str
    model: WanTransformer
    cache: KVCache
    latents: torch.Tensor
    text: TextKV
    device: torch.device

    @property
    def steps(self) -> int:
        """Denoising passes of a chunk."""
        return len(self.preset.steps)

    def variants(self) -> tuple[Variant, ...]:
        """Those that exist here: wanrt's kernels need CUDA and Triton, elsewhere its own path is the plain one."""
        own = self.device.type == "cuda" and HAVE_TRITON
        paths = ("plain", "own") if own else ("plain",)
        return tuple(Variant(path, compiled) for compiled in (False, True) for path in paths)

    def plans(self) -> dict[str, PassPlan]:
        """The passes of a steady chunk by name: context (or commit) and a denoising step."""
        self.cache.reset()
        other = Pass.CONTEXT if self.cache.policy is CachePolicy.RECOMPUTE else Pass.COMMIT
        frames = self.cache.capacity if other is Pass.CONTEXT else CHUNK_LATENTS
        while True:
            plan = self.cache.begin(other, frames)
            full = plan.keep == self.cache.context_frames
            self.cache.finish(plan)
            if full:
                return {str(other): plan, "denoise": self.cache.begin(Pass.DENOISE, CHUNK_LATENTS)}

    def time(self, timestep: float) -> TimeEmbedding:
        """The embedding of a timestep that all frames have; a stream keeps it, so no pass pays for it."""
        with torch.no_grad():
            return self.model.embed_time(torch.full((1, 1), timestep, device=self.device))

    def runner(self, plan: PassPlan) -> Callable[[], object]:
        """A call that makes one pass, and may be repeated."""
        frames = self.latents[:, :, :1].expand(-1, -1, plan.frames, -1, -1).contiguous()
        time = self.time(500.0 if plan.pass_ is Pass.DENOISE else 0.0)

        def run() -> object:
            return self.model.run(frames, time, self.text, self.cache, plan, None)

        return run

    @contextmanager
    def arranged(self, variant: Variant, backend: str | None = None) -> Iterator[None]:
        """Inside the block the model runs as `variant` says, compiled by `backend` (default: the subject's).

        Raises `RunError` when the compiler cannot work on this machine.
        """
        self.model.elementwise = variant.ops
        torch._dynamo.reset()
        try:
            if variant.compiled:
                compile_blocks(self.model, backend or self.backend)
            # Inductor's CPU loops say their names in profiles only when asked to
            with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
                yield
        except Exception as error:
            if (told := _explained(error)) is not None:
                raise told from error
            raise
        finally:
            self.model.elementwise = LOCAL
            for block in self.model.blocks:
                block._compiled_call_impl = None  # torch knows no other way back
            torch._dynamo.reset()


def _explained(error: Exception) -> RunError | None:
    """A lack of tools in one line; None for any other error."""
    for cause in _causes(error):
        if type(cause).__name__ == "InvalidCxxCompiler":
            return RunError(
                "torch.compile: Inductor found no working C++ compiler, expected g++ or clang++ (or CXX=path); "
                "install one, or measure with --backend aot_eager, which fuses nothing"
            )
        if type(cause).__name__ == "TritonMissing":
            return RunError(
                "torch.compile: Inductor found no working Triton, which it needs on CUDA; pip install triton, "
                "or measure with --backend aot_eager, which fuses nothing"
            )
    return None


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from; torch's compiler keeps some in `inner_exception`."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or getattr(cause, "inner_exception", None)
    return found


def open_subject(
    preset: Preset,
    *,
    size: tuple[int, int] | None,
    layers: int | None,
    device: torch.device,
    dtype: torch.dtype,
    attention: AttentionBackend = AttentionBackend.AUTO,
    backend: str = "inductor",
    seed: int = 0,
) -> CompileSubject:
    """Draws the model.

    `layers`: how many of the preset's; None: all. Raises `UsageError` for more than it has, less than two (the first
    and the last layer differ from the others), or an unknown `backend`.
    """
    config = preset.transformer_config()
    if layers is not None and not 2 <= layers <= config.num_layers:
        raise UsageError(
            f"--layers: got {layers}, expected 2 to {config.num_layers}, the layers of {preset.name}"
        )
    known = ("inductor", "aot_eager", "eager")
    if backend not in known:
        raise UsageError(f"--backend: got {backend!r}, expected one of {', '.join(known)}")
    config = replace(config, num_layers=layers or config.num_layers)
    width, height = size or preset.video.sizes[0]
    model = random_weights(
        build_on_meta(lambda: WanTransformer(config, attention=attention)), seed, device, dtype
    )
    if device.type == "cuda":
        join_products(model)  # as the pipeline does
    cache = KVCache.allocate(
        config,
        policy=CachePolicy(preset.cache.policy),
        frames=preset.cache.window,
        grid=(height // 16, width // 16),
        sink=preset.cache.sink,
        device=device,
        dtype=dtype,
    )
    shape = (1, config.in_channels, CHUNK_LATENTS, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    with torch.no_grad():
        prompt = hashed_embedding(config.text_len, config.text_dim, device, "a red ball bouncing")
        text = model.embed_text(prompt)
    log.info(model.paths())
    return CompileSubject(preset, (width, height), backend, model, cache, latents, text, device)
