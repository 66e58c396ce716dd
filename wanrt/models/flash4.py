"""FlashAttention-4 as one operator, if it is installed: PyPI flash-attn-4, kernels for compute capability 9, 10 and 12.

The package is imported by the first call, as that takes seconds, and compiles its kernel then: one for all lengths and
numbers of heads, so that whatever runs before a graph is captured has compiled it. It runs on the current stream and
waits for nothing. Limits and layouts are those of flash_attn/cute/interface.py in Dao-AILab/flash-attention, as
released in 4.0.0b36.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor


def _installed() -> bool:
    """By the package's metadata: to look for the module would import its parent, which may be FlashAttention-2's."""
    try:
        version("flash-attn-4")
    except PackageNotFoundError:
        return False
    return True


HAVE_FLASH_4 = _installed()
CAPABILITIES = (9, 10, 12)  # compute capabilities (major)


def why_no_flash_4(capability: int) -> str | None:
    """Why a device of this compute capability (major) cannot run it, in one line; None: it can. Imports it to know."""
    if capability not in CAPABILITIES:
        return f"compute capability {capability}, not 9, 10 or 12"
    if not HAVE_FLASH_4:
        return "flash-attn-4 is not installed; pip install 'wanrt[fa4]'"
    try:
        import_module("flash_attn.cute")
    except Exception as broken:  # whatever libraries of another version or CUDA raise
        return f"flash-attn-4 cannot be imported: {' '.join(f'{type(broken).__name__}: {broken}'.split())}"
    return None


# An operator, as torch.compile cannot trace what is behind it: 10 us a call on the host, which a CUDA graph saves.
@torch.library.custom_op(
    "wanrt::flash_attention_4", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)"
)
def flash_4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v, and the log-sum-exp of the scaled scores.

    Args:
        q: `[B, Tq, H, D]` in bf16 or fp16, D a multiple of 8 up to 128.
        k, v: `[B, Tk, H, D]`, likewise. Views whose D is contiguous and whose rows begin at multiples of 16 bytes are
            taken as they are, others copied.

    Returns:
        `[B, Tq, H, D]`, contiguous, in q's dtype, and `[B, H, Tq]` in fp32, natural logarithm.
    """
    attend = import_module("flash_attn.cute").flash_attn_func
    out, lse = attend(q, k, v, return_lse=True)
    return out, lse


@flash_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)
