"""Ranks wait for each other on their GPUs: a kernel that tells all and returns when all have told it.

Every rank counts its barriers and stores the count on all ranks, in a place of its own; it may go on when it finds
that count from everyone. Nothing is ever set back, so it can be captured in a graph and replayed for years (64 bits).
What a rank stored on others before, in earlier kernels of its stream, they see afterwards (release and acquire at
system scope). A rank that died would be waited for without end: a word in host memory lets everybody through.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch brings no Triton, and needs none of this
    triton = None

LOOK_EVERY = 1024  # tries between two looks at the host's word, which take a microsecond and more each

if triton is not None:

    @triton.jit
    def _barrier_kernel(words_ptr, count_ptr, rank, RANKS: tl.constexpr, LOOK_EVERY: tl.constexpr):
        count = tl.load(count_ptr) + 1
        tl.store(count_ptr, count)
        for to in tl.static_range(RANKS):
            theirs = tl.load(words_ptr + to).to(tl.pointer_type(tl.int64))
            tl.atomic_xchg(theirs + rank, count, sem="release", scope="sys")
        mine = tl.load(words_ptr + rank).to(tl.pointer_type(tl.int64))
        stop = tl.load(words_ptr + RANKS).to(tl.pointer_type(tl.int64))
        for other in tl.static_range(RANKS):
            seen = tl.atomic_add(mine + other, 0, sem="acquire", scope="sys")
            tries = 0
            while seen < count:
                seen = tl.atomic_add(mine + other, 0, sem="acquire", scope="sys")
                tries += 1
                # two branches: `and` would read the word at every try
                if tries % LOOK_EVERY == 0:  # noqa: SIM102
                    if tl.load(stop, volatile=True) != 0:
                        seen = count


def barrier(words: Tensor, count: Tensor, rank: int) -> None:
    """Go on, on the current stream, when all ranks of `words` came to the same call. CUDA only.

    Args:
        words: int64 [N + 1] on the device: the address of int64 [N] zeros on every rank, in memory that all can
            write, then that of one int64 in pinned host memory: not 0 lets this rank through, now and ever after.
        count: int64 [1] on the device, zero at first: how many barriers there were.
        rank: of N.

    Raises:
        ValueError: tensors of other types, or no GPU.
    """
    if not words.is_cuda or words.dtype != torch.int64 or count.dtype != torch.int64:
        raise ValueError(
            f"words, count: got {words.dtype} and {count.dtype} on {words.device}, expected int64 on CUDA"
        )
    _barrier_kernel[(1,)](words, count, rank, RANKS=words.numel() - 1, LOOK_EVERY=LOOK_EVERY, num_warps=1)
