"""Graph breaks, with the line that causes them, and recompilations, with the guard that failed.

Breaks come from `torch._dynamo.explain`, recompilations from `torch._dynamo.utils.get_compilation_metrics`: both tell
in plain data what the logs of TORCH_LOGS=graph_breaks,recompiles would print.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import clear_compilation_metrics, get_compilation_metrics

from wanrt.models.kv_cache import CachePolicy
from wanrt.pipeline.context import CHUNK_LATENTS
from wanrt.pipeline.denoiser import TransformerDenoiser
from wanrt.pipeline.models import hashed_embedding
from wanrt.pipeline.noise import noise
from wanrt.probes.compile_subject import CompileSubject, Variant


@dataclass(frozen=True)
class Break:
    """One place where tracing stops and a graph ends."""

    reason: str
    file: str
    line: int
    code: str


@dataclass(frozen=True)
class Tracing:
    """How one pass traces, as a whole."""

    name: str
    graphs: int
    operators: int
    breaks: tuple[Break, ...]


@dataclass(frozen=True)
class Compilation:
    """One graph that was compiled: whose code, and the guard that failed (None: the first graph of this code)."""

    function: str
    file: str
    line: int
    guard: str | None


@dataclass(frozen=True)
class Event:
    """What happened in a stream, and what was compiled because of it.

    `live`: a change after which nothing may compile; otherwise its shapes or paths are new and graphs are due.
    """

    name: str
    live: bool
    compiled: tuple[Compilation, ...]


def trace(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Tracing:
    """Trace a call and collect its graph breaks. The call runs; earlier compiled code is forgotten."""
    with torch.no_grad():
        found = torch._dynamo.explain(call)(*args, **kwargs)
    torch._dynamo.reset()
    breaks = tuple(_break(reason) for reason in found.break_reasons if reason.graph_break)
    return Tracing(name, found.graph_count, found.op_count, breaks)


def _break(reason: Any) -> Break:
    words = " ".join(str(reason.reason).split("\n")[0].split())
    frame = reason.user_stack[-1] if reason.user_stack else None
    if frame is None:
        return Break(words, "?", 0, "")
    return Break(words, _short(frame.filename), frame.lineno or 0, frame.line or "")


def _short(file: str) -> str:
    """A path from the package on: `wanrt/models/memory.py`, however deep the rest of it."""
    parts = Path(file).parts
    for package in ("wanrt", "kernels", "wanrt_kernels", "torch"):
        if package in parts[:-1]:
            last = max(i for i, part in enumerate(parts[:-1]) if part == package)
            return "/".join(parts[last:])
    return file


def trace_passes(
    subject: CompileSubject, report: Callable[[str], None] = lambda _name: None
) -> tuple[Tracing, ...]:
    """Every pass of a steady chunk traced whole, the denoising step with attention bias too; timesteps apart. `report`
    hears each one's name before it.
    """

    def traced(name: str, call: Callable[..., Any], *args: Any) -> Tracing:
        report(name)
        return trace(name, call, *args)

    bias = torch.tensor(-1.0, device=subject.device)
    timesteps, time = torch.zeros(1, 1, device=subject.device), subject.time(0.0)
    found = [traced("time embedding", subject.model.embed_time, timesteps)]
    for name, plan in subject.plans().items():
        latents = subject.latents[:, :, :1].expand(-1, -1, plan.frames, -1, -1)
        args = latents, time, subject.text, subject.cache, plan
        found.append(traced(name, subject.model.run, *args))
        if name == "denoise":
            found.append(traced("denoise, biased", subject.model.run, *args, bias))
    return tuple(found)


def compilations(run: Callable[[], Any]) -> tuple[Compilation, ...]:
    """What `run` makes dynamo compile."""
    clear_compilation_metrics()
    run()
    return tuple(
        Compilation(
            m.co_name or "?", _short(m.co_filename or "?"), m.co_firstlineno or 0, _guard(m.recompile_reason)
        )
        for m in get_compilation_metrics()
    )


def _guard(reason: str | None) -> str | None:
    """The guard of a recompilation: `0/1: size mismatch ...  # code` without its number and the stack below."""
    if reason is None:
        return None
    first = reason.split("\n")[0].split("  #")[0]
    return " ".join(first.partition(": ")[2].split()) or " ".join(first.split())


@dataclass
class _Stream:
    """A stream of a few chunks, changed in the ways that a live one is."""

    subject: CompileSubject
    denoiser: TransformerDenoiser
    steps: tuple[float, ...]
    seed: int = 0
    made: int = 0

    def prompt(self, text: str) -> None:
        config = self.subject.model.config
        embedding = hashed_embedding(config.text_len, config.text_dim, self.subject.device, text)
        self.denoiser.set_text(embedding)

    def chunk(self) -> None:
        """Context (if there is any), every denoising step, commit (if the cache wants one)."""
        cache = self.subject.cache
        recompute = cache.policy is CachePolicy.RECOMPUTE
        held = min(self.made * CHUNK_LATENTS, cache.capacity)
        latents = noise(self.seed, self.made, 0, tuple(self.subject.latents.shape)).to(self.subject.device)
        if recompute and held:
            self.denoiser.context(latents[:, :, :1].repeat(1, 1, held, 1, 1))
        for step in self.steps:
            latents = self.denoiser.denoise(latents, step)
        if not recompute:
            self.denoiser.commit(latents)
        self.made += 1

    def restart(self) -> None:
        self.subject.cache.reset()
        self.made = 0

    def fill(self) -> Iterator[str]:
        """Makes chunks until the context is full and one more; yields a name before each."""
        chunks = -(-self.subject.cache.capacity // CHUNK_LATENTS)
        for index in range(chunks + 2):
            yield "steady chunk" if index == chunks + 1 else f"chunk {index}"


def follow(subject: CompileSubject, report: Callable[[str], None] = lambda _name: None) -> tuple[Event, ...]:
    """A stream through everything that changes, on layers compiled as `compile_blocks` does, but for a backend that
    only records: guards do not depend on it.
    """
    path = subject.variants()[-1].path  # wanrt's own where it exists: that is what renders
    events = []
    # all of it in inference mode, as in the pipeline: dynamo guards on whether a tensor was made there
    with subject.arranged(Variant(path, True), backend="eager"), torch.inference_mode():
        denoiser = TransformerDenoiser(subject.model, subject.cache, subject.device)
        stream = _Stream(subject, denoiser, subject.preset.steps[:2])
        stream.prompt("a red ball bouncing")
        stream.restart()
        for name, live, change in _story(stream):
            report(name)
            change()
            events.append(Event(name, live, compilations(stream.chunk)))
    return tuple(events)


def _story(stream: _Stream) -> Iterator[tuple[str, bool, Callable[[], None]]]:
    """(what changes, whether it is a live change, how)."""
    set_bias = stream.denoiser.set_bias

    def nothing() -> None: ...

    for name in stream.fill():
        yield name, name == "steady chunk", nothing
    yield "another prompt", True, lambda: stream.prompt("a green star spinning over the sea")
    yield "other timesteps", True, lambda: setattr(stream, "steps", tuple(t - 7.5 for t in stream.steps))
    yield "another seed", True, lambda: setattr(stream, "seed", 12345)
    yield "bias on (0.3)", False, lambda: set_bias(0.3)
    yield "another bias (0.7)", True, lambda: set_bias(0.7)
    yield "bias off", True, lambda: set_bias(1.0)
    yield "a new video: chunk 0", True, stream.restart
    yield "a new video: chunk 1", True, nothing
