"""Products of a Wan transformer in fp8: which ones, as data, and what takes their place. Applied from outside.

A product `x W^T` becomes `torch._scaled_mm` of e4m3fn numbers with one scale a token and one a row of W (an output
channel), rounded to bf16 once. Scales of activations are made where the activations are made: the AdaLN kernel
quantises once for q, k and v, the GELU kernel for the feed-forward's second product, a row kernel for attention's
output. `use_fast_accum` is on: Hopper's tensor cores then keep some 14 bits of a sum (DeepSeek-AI 2024,
arXiv:2412.19437, section 3.3.2), e4m3fn 4 bits of a number, so what it loses is not what is lost.

What stays in 16 bits: the first and the last block, through which all that is read and written passes; patch, text
and time embeddings, the time projection and the head, which are small, run once a pass, and reach every token of
every layer; cross-attention's k and v, computed once a prompt, so that nothing would be gained.

Evidence for the blocks: wan-tiny's own weights (8 blocks), relative error of x0 against fp32 in the first step of its
first chunk:

    bf16 everywhere                     0.013
    fp8 in every block                  0.071
    ... but the first / but the last    0.053 / 0.065
    ... but the first and the last      0.044
    ... but two in the middle           0.068

With random weights all blocks are alike (0.024, and 0.021 without any two of the eight): it is what was learned that
makes the ends sensitive. Of 40 blocks two cost 5 % of what fp8 saves.

Shapes: B batch, T tokens, K inputs and N outputs of a product.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from wanrt_kernels.gelu_rows import gelu_rows
from wanrt_kernels.quant_rows import FP8, Rows, quantise_rows, quantise_rows_ref

ALIGNMENT = 16  # `torch._scaled_mm` takes K and N in multiples of this
FIRST_CAPABILITY = (8, 9)  # Ada; older tensor cores know no fp8
# Before this, the rowwise kernel for SM 8.9 ignores the current stream (pytorch/pytorch #177651): results too late for
# whoever waits on that stream, and nothing that a CUDA graph could capture.
SM89_SINCE = (2, 12)

# Where a partial product of a shape and dtype goes that others will sum; None: sum it at once.
Room = Callable[[Sequence[int], torch.dtype], Tensor | None]


class Product(Protocol):
    """How a layer multiplies rows `[M, K]`."""

    def __call__(self, x: Rows, layer: Fp8Linear, out: Tensor | None = None) -> Tensor:
        """`[M, N]` in the layer's `out_dtype`: `out`, or a new tensor."""
        ...


@dataclass(frozen=True)
class Fp8Plan:
    """Which linear layers become fp8: those whose dotted name matches one of `modules` (regular expressions)."""

    modules: tuple[str, ...]

    def covers(self, name: str) -> bool:
        """Whether the module of this dotted name does."""
        return any(re.fullmatch(pattern, name) for pattern in self.modules)


ALL_BLOCKS = Fp8Plan(
    (
        r"blocks\.\d+\.self_attn\.[qkvo]",
        r"blocks\.\d+\.cross_attn\.[qo]",
        r"blocks\.\d+\.ffn\.[02]",
    )
)


def plan_for(layers: int) -> Fp8Plan:
    """The plan of a transformer of so many blocks: all but the first and the last."""
    return Fp8Plan(tuple(p.replace(r"\d+", f"(?!(0|{layers - 1})\\b)\\d+", 1) for p in ALL_BLOCKS.modules))


def scaled_product(x: Rows, layer: Fp8Linear, out: Tensor | None = None) -> Tensor:
    """The device's own fp8 product, bf16."""
    into = {} if out is None else {"out": out}
    return torch._scaled_mm(
        x.values,
        layer.weight.t(),
        scale_a=x.scale,
        scale_b=layer.weight_scale.unsqueeze(0),
        bias=layer.bias if layer.adds_bias else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
        **into,
    )


def dequantised_product(x: Rows, layer: Fp8Linear, out: Tensor | None = None) -> Tensor:
    """The same numbers multiplied in fp32: a reference for tests, on any device, slow."""
    y = x.dequantise() @ (layer.weight.float() * layer.weight_scale.unsqueeze(1)).t()
    if layer.bias is not None and layer.adds_bias:
        y = y + layer.bias.float()
    return y.to(layer.out_dtype) if out is None else out.copy_(y)


class Fp8Linear(nn.Module):
    """A linear layer with e4m3fn weights, for inference.

    Args:
        shape: (N, K).
        bias: with a bias `[N]`.
        join: what makes a partial product `[..., N]` whole: the sum over a group of ranks that hold K / n inputs
            each. None: nothing to join.
        room: where a partial product goes that is not to be made whole here. None: every one is.
        adds_bias: whether this rank's part of the sum contains the bias.
        product: how rows are multiplied.
        device: of the empty parameters.

    Raises:
        ValueError: K or N that the product cannot take.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bias: bool,
        join: Callable[[Tensor], Tensor] | None = None,
        room: Room | None = None,
        adds_bias: bool = True,
        product: Product = scaled_product,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if any(size % ALIGNMENT for size in shape):
            n, k = shape
            raise ValueError(
                f"{n} outputs, {k} inputs: {n} % {ALIGNMENT} = {n % ALIGNMENT}, {k} % {ALIGNMENT} = {k % ALIGNMENT}; "
                f"expected 0 and 0 for an fp8 product"
            )
        self.weight = _frozen(torch.empty(shape, dtype=FP8, device=device))
        self.weight_scale = _frozen(torch.empty(shape[0], dtype=torch.float32, device=device))
        self.bias = _frozen(torch.empty(shape[0], device=device)) if bias else None
        self.join, self.room, self.adds_bias, self.product = join, room, adds_bias, product

    @property
    def out_dtype(self) -> torch.dtype:
        """The bias's, and so the model's."""
        return torch.bfloat16 if self.bias is None else self.bias.dtype

    def forward(self, x: Tensor | Rows) -> Tensor:
        """`[..., K]`, quantised already or not, to `[..., N]`."""
        rows = x if isinstance(x, Rows) else quantise_rows(x.contiguous())
        flat, leading = Rows(rows.values.flatten(0, -2), rows.scale.flatten(0, -2)), rows.values.shape[:-1]
        room = None if self.room is None else self.room((*leading, len(self.weight)), self.out_dtype)
        if room is not None:
            self.product(flat, self, room.flatten(0, -2))
            return room
        y = self.product(flat, self).unflatten(0, leading)
        return y if self.join is None else self.join(y)


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


class GeluRows(nn.Module):
    """GELU whose output is quantised for the next product."""

    def forward(self, x: Tensor) -> Rows:
        """`[..., K]` to rows."""
        return gelu_rows(x)


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight `[N, K]` as e4m3fn and its scales `[N]`. Scales are of this slice: each rank has its own."""
    rows = quantise_rows_ref(weight)
    return rows.values, rows.scale.squeeze(1)


def apply_fp8(model: nn.Module, plan: Fp8Plan = ALL_BLOCKS, product: Product = scaled_product) -> int:
    """Put fp8 products into a transformer, in place; parameter names stay, and `weight_scale` joins them.

    Works after tensor parallelism was applied (a rank quantises its own slices), before or after Ulysses, on a
    model built on meta (`wanrt.weights.loading.fill` then quantises as it reads) and on one with weights. Gives the
    number of products.

    Raises:
        ValueError: a layer whose sizes fp8 products cannot take, or q, k and v, which share one quantised input,
            planned apart.
    """
    found = {name: module for name, module in model.named_modules() if plan.covers(name)}
    _check_shared(model, found)
    for name, module in found.items():
        try:
            model.set_submodule(name, _replacement(module, product))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name in found:
        parent, _, leaf = name.rpartition(".")
        if leaf == "2" and isinstance(model.get_submodule(f"{parent}.1"), nn.GELU):
            model.set_submodule(f"{parent}.1", GeluRows())
    return len(found)


def _check_shared(model: nn.Module, found: dict[str, nn.Module]) -> None:
    for name in found:
        parent, _, leaf = name.rpartition(".")
        missing = [f"{parent}.{other}" for other in "qkv" if f"{parent}.{other}" not in found]
        if parent.endswith("self_attn") and leaf in "qkv" and missing:
            raise ValueError(
                f"{name} in fp8 without {', '.join(missing)}: q, k and v share one input; plan all three"
            )


def _replacement(module: nn.Module, product: Product) -> Fp8Linear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    layer = Fp8Linear(
        (weight.shape[0], weight.shape[1]),
        bias=bias is not None,
        join=getattr(module, "join", None),
        room=getattr(module, "room", None),
        adds_bias=getattr(module, "adds_bias", True),
        product=product,
        device="meta",
    )
    if not weight.is_meta:
        layer.weight, layer.weight_scale = (_frozen(part) for part in quantised_weight(weight.detach()))
        layer.bias = None if bias is None else _frozen(bias.detach())  # type: ignore[operator]
    return layer


def takes_rows(layer: nn.Module) -> bool:
    """Whether a layer would rather have its input quantised."""
    return isinstance(layer, Fp8Linear)


def why_no_fp8(device: torch.device) -> str | None:
    """Why `device` has no fp8 product, in a few words; None: it has."""
    if device.type != "cuda":
        return f"{device} has no fp8 product"
    capability = torch.cuda.get_device_capability(device)
    if capability == FIRST_CAPABILITY and _torch_version() < SM89_SINCE:
        return (
            f"torch {torch.__version__} multiplies fp8 rows on SM 8.9 outside the current stream "
            f"(pytorch #177651, fixed in {'.'.join(map(str, SM89_SINCE))})"
        )
    if capability >= FIRST_CAPABILITY:
        return None
    got, expected = (".".join(map(str, version)) for version in (capability, FIRST_CAPABILITY))
    return f"{torch.cuda.get_device_name(device)} is SM {got}, fp8 products need SM {expected}"


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def product_error(device: torch.device) -> float:
    """Error of a device's fp8 product against the same numbers in fp32, relative, by norm. Raises what torch does."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator).to(device) for size in ((96, 512), (256, 512)))
    layer = Fp8Linear((256, 512), bias=False, device=device)
    layer.weight, layer.weight_scale = (_frozen(part) for part in quantised_weight(weight))
    rows = quantise_rows(x)
    exact = dequantised_product(rows, layer).float()
    return float((scaled_product(rows, layer).float() - exact).norm() / exact.norm())
