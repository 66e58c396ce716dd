"""What both trainers share: ranks, flat gradients, optimisers, schedule, averaging, checkpoints.

Every random number of a step comes from (seed, step, rank), so a run that resumes from a checkpoint is the
run that was never interrupted, bit for bit on one machine.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger("wanrt.tiny")


@dataclass(frozen=True)
class Ranks:
    """This process among its peers: one GPU each, or gloo on CPUs; alone when not started by torchrun."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def start(cls) -> Ranks:
        """Join the process group that torchrun's environment names."""
        size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        if size > 1:
            dist.init_process_group("nccl" if gpu else "gloo")
        return cls(rank, size, device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average `tensor` over the ranks in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)
        return tensor

    def agree(self, value: float) -> float:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return float(shared.item())

    def stop(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def generator(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator on `device` seeded by a mix of `numbers` (seed, step, rank, ...)."""
    mixed = 0x9E3779B97F4A7C15
    for n in numbers:
        mixed = ((mixed ^ (n + 0x9E3779B9)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
    return torch.Generator(device).manual_seed(mixed)


def mixed_seed(*numbers: int) -> int:
    """The seed that `generator` would use."""
    return generator("cpu", *numbers).initial_seed()


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal factor of `[n, rows, columns]` matrices, roughly (singular values near 1).

    Quintic iteration and its coefficients: Keller Jordan et al., "Muon" (2024),
    https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for hidden matrices (Jordan et al. 2024); kernels are flattened.

    Matrices of one shape go through the iteration together.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0):
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.flatten(1).shape), []).append(p)
            for shape, params in by_shape.items():
                self._update(params, shape, group)

    def _update(self, params: list[Tensor], shape: tuple[int, ...], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        turned = newton_schulz(torch.stack([n.flatten(1) for n in nesterov]))
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        if group["decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["decay"])
        for p, u in zip(params, turned.unbind(0), strict=True):
            p.add_(u.view_as(p), alpha=-scale)


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or minutes from the start of the run; warm-up in steps."""

    steps: int = 0
    minutes: float = 0.0
    warmup: int = 100
    floor: float = 0.03

    def rate(self, step: int, progress: float) -> float:
        """The learning rate's factor: linear warm-up, then a cosine from 1 down to `floor`."""
        cosine = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return min(1.0, (step + 1) / max(1, self.warmup)) * cosine


class Clock:
    """Progress 0..1 through a budget, agreed between ranks every few steps."""

    every = 10

    def __init__(self, budget: Budget, ranks: Ranks, done: float = 0.0) -> None:
        self.budget, self.ranks = budget, ranks
        self.begun = time.monotonic() - done * budget.minutes * 60
        self.progress = done

    def at(self, step: int) -> float:
        """Progress at `step`; the run ends when it reaches 1."""
        if self.budget.steps:
            self.progress = step / self.budget.steps
        elif step % self.every == 0:
            spent = (time.monotonic() - self.begun) / (self.budget.minutes * 60)
            self.progress = self.ranks.agree(spent)
        return self.progress


class FlatGradients:
    """The gradients of all parameters as views of one buffer: one all-reduce, one norm."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.flat = torch.zeros(sum(p.numel() for p in params), device=params[0].device)
        offset = 0
        for p in params:
            p.grad = self.flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()

    def zero_(self) -> None:
        """Clear for the next step."""
        self.flat.zero_()

    def reduce_and_clip_(self, ranks: Ranks, limit: float) -> Tensor:
        """Average over ranks, scale down to norm `limit`, drop a step with a non-finite gradient.

        Returns the norm before clipping, 0-dim, on the device.
        """
        ranks.mean_(self.flat)
        norm = self.flat.norm()
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        self.flat.mul_(torch.where(norm.isfinite(), factor, torch.zeros_like(factor)))
        torch.nan_to_num_(self.flat, nan=0.0, posinf=0.0, neginf=0.0)
        return norm


@dataclass
class Average:
    """An exponential moving average of parameters; `decay` rises from 0 with the steps."""

    shadow: list[Tensor]
    decay: float

    @classmethod
    def of(cls, params: list[nn.Parameter], decay: float) -> Average:
        """Start from the parameters' present values."""
        return cls([p.detach().clone() for p in params], decay)

    @torch.no_grad()
    def update(self, params: list[nn.Parameter], step: int) -> None:
        """Move towards `params`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in params], 1 - decay)

    @torch.no_grad()
    def swap(self, params: list[nn.Parameter]) -> None:
        """Exchange the averaged and the trained values; call again to go back."""
        for mine, p in zip(self.shadow, params, strict=True):
            keep = p.detach().clone()
            p.copy_(mine)
            mine.copy_(keep)


@dataclass
class Run:
    """A training run's moving parts: parameters by name, optimisers, average, step."""

    names: list[str]
    params: list[nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    average: Average
    gradients: FlatGradients
    step: int = 0
    progress: float = 0.0
    rates: list[float] = field(default_factory=list)

    def update(self, ranks: Ranks, factor: float, clip: float) -> Tensor:
        """After backward: reduce, clip, step every optimiser, average, clear. Returns the norm."""
        norm = self.gradients.reduce_and_clip_(ranks, clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
            optimizer.step()
        self.average.update(self.params, self.step)
        self.gradients.zero_()
        self.step += 1
        return norm

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "params": dict(zip(self.names, [p.detach().cpu() for p in self.params], strict=True)),
            "average": dict(zip(self.names, [a.cpu() for a in self.average.shadow], strict=True)),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "progress": self.progress,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any], *, weights_only: bool = False) -> None:
        """Continue from `state()`; `weights_only` starts the schedule anew from the averaged weights."""
        source = state["average"] if weights_only else state["params"]
        for name, p, a in zip(self.names, self.params, self.average.shadow, strict=True):
            p.copy_(source[name])
            a.copy_(state["average"][name])
        if weights_only:
            return
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.progress = state["step"], state["progress"]


def make_run(
    named: list[tuple[str, nn.Parameter]],
    *,
    optimizer: str,
    lr: float,
    matrix: Any = None,
    decay: float = 0.01,
    average: float = 0.999,
) -> Run:
    """A run over named parameters.

    `optimizer` is "adamw" (all at `lr`) or "muon": parameters for which `matrix(name, p)` is true go to
    Muon at 20 x `lr`, the rest to AdamW at `lr`.
    """
    params = [p for _, p in named]
    gradients = FlatGradients(params)
    fused = params[0].is_cuda
    hidden = [p for n, p in named if optimizer == "muon" and matrix is not None and matrix(n, p)]
    rest = [p for _, p in named if all(p is not h for h in hidden)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.98), eps=1e-8, fused=fused)
    ]
    if hidden:
        optimizers.append(Muon(hidden, lr=20 * lr, decay=decay))
    return Run([n for n, _ in named], params, optimizers, Average.of(params, average), gradients)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    part.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint (tensors and plain values only)."""
    return torch.load(path, map_location="cpu", weights_only=True)


def prefixed(modules: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of several modules, named "module/parameter"."""
    for prefix, module in modules.items():
        for name, p in module.named_parameters():
            yield f"{prefix}/{name}", p


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of one module out of a checkpoint's dict."""
    return {k.removeprefix(prefix + "/"): v for k, v in state.items() if k.startswith(prefix + "/")}
