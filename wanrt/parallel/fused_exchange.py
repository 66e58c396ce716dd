"""What the ranks of a tensor-parallel transformer tell each other, by the kernels that run between its products.

A layer with its inputs spread leaves a partial product on every rank, in shared memory. The residual's next step sums
them: each rank for its own tokens, of which it alone keeps the residual, storing the normalised ones everywhere
(`wanrt_kernels.shared_add_norm`). Where an all-reduce rounds its sums to the products' 16 bits, these stay fp32 until
the residual is rounded.

Who waits for whom. An exchange of tokens is: wait for all, the kernel, wait for all. So is one of squares, but for the
first wait where an exchange of tokens has just made it needless. One buffer of each kind is enough:

- Partial products. A rank overwrites its own with its next product, which it starts after the second wait: all have
  read it.
- Normalised tokens. They are read by the products that follow on the same rank, all of which it has started before it
  comes to the next exchange's first wait. Nobody stores the next ones before that. The same holds from one pass to the
  next, and for each of the buffers (numbers of the products' dtype, fp8 rows with their scales, fp32 for the head).
- Mean squares. They are stored before the wait and read after it: by rotary kernels up to the pass's end, so not yet
  by all when the first rank goes on. In a layer an exchange of tokens, with its waits, lies between the last reader and
  the next to store. Where none does (a pass's last layer and the next pass's first, one layer's text and the next
  one's), a wait comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from wanrt.models.memory import Elementwise
from wanrt.parallel.peers import Peers, SharedBuffers
from wanrt_kernels.quant_rows import FP8, Rows
from wanrt_kernels.shared import Shared
from wanrt_kernels.shared_add_norm import shared_add_norm, shared_add_norm_rows
from wanrt_kernels.shared_mean_squares import store_mean_squares

log = logging.getLogger("wanrt.parallel")


class FusedExchange:
    """The exchanges of one model on one stream of this rank; see the module's head.

    Args:
        peers: the ranks.
        whole: what finishes residuals where nothing is exchanged.
        rows_dtype: of quantised values; fp32 leaves their rounding out, for tests (Triton's interpreter loses its
            carries).
    """

    def __init__(self, peers: Peers, whole: Elementwise, rows_dtype: torch.dtype = FP8) -> None:
        self.whole, self.rows_dtype = whole, rows_dtype
        self._peers, self._buffers = peers, SharedBuffers(peers)
        self._spreads: dict[
            tuple[int, ...], bool
        ] = {}  # [B, T]: whether a pass of this shape spreads its tokens
        self._squares_read = False  # whether all ranks are known to be past their reads of the mean squares

    def room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Where a partial product `[B, T, C]` goes; None: these tokens cannot be spread, it must be summed at once."""
        return self._buffers.take("partial", shape, dtype).here if self._spread(shape) else None

    def add_norm(
        self,
        x: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        *,
        eps: float,
        plus_one: bool = True,
        normed_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`Elementwise.add_norm` of `update`, this rank's partial product `[1, T, C]`.

        x: `[1, T, C]` in the first exchange of a pass, then what the last one gave. Returns (this rank's share of the
        new residual `[1, T / N, C]`, all normalised tokens `[1, T, C]`, which the next exchange overwrites).
        """
        if update is None or not self._spread(update.shape):
            return self.whole.add_norm(
                x, update, gate, scale, shift, eps=eps, plus_one=plus_one, normed_dtype=normed_dtype
            )
        normed = self._buffers.take("normed", update.shape, normed_dtype or x.dtype)
        x, partial = self._share(x, update), self._partial(update)
        self._peers.barrier()
        total = shared_add_norm(
            x, partial, gate, scale, shift, normed, rank=self._peers.rank, eps=eps, plus_one=plus_one
        )
        self._peers.barrier()
        # only the head names a dtype: a pass ends, and others may follow as graphs, which do not come by here
        self._squares_read = normed_dtype is None
        return total, normed.here

    def add_norm_rows(
        self,
        x: Tensor,
        update: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        *,
        eps: float,
        plus_one: bool = True,
    ) -> tuple[Tensor, Rows]:
        """`Elementwise.add_norm_rows`, as `add_norm`."""
        if update is None or not self._spread(update.shape):
            return self.whole.add_norm_rows(x, update, gate, scale, shift, eps=eps, plus_one=plus_one)
        values = self._buffers.take("rows", update.shape, self.rows_dtype)
        scales = self._buffers.take("row scales", (*update.shape[:-1], 1), torch.float32)
        x, partial = self._share(x, update), self._partial(update)
        self._peers.barrier()
        total = shared_add_norm_rows(
            x, partial, gate, scale, shift, values, scales, rank=self._peers.rank, eps=eps, plus_one=plus_one
        )
        self._peers.barrier()
        self._squares_read = True
        return total, Rows(values.here, scales.here)

    def mean_squares(self, projections: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`Elementwise.mean_squares` of projections `[B, T, C / N]`: `[B, T, N]` each, until the next call."""
        batch, tokens, _ = projections[0].shape
        shape = (self._peers.size, len(projections), batch, tokens)
        squares = self._buffers.take("mean squares", shape, torch.float32)
        if not self._squares_read:
            self._peers.barrier()
        store_mean_squares(projections, squares, rank=self._peers.rank)
        self._peers.barrier()
        self._squares_read = False
        return squares.here.permute(1, 2, 3, 0).unbind()

    def _spread(self, shape: Sequence[int]) -> bool:
        """Whether tokens `[B, T, ...]` are spread over the ranks; the log says so once for each shape."""
        batch, tokens = shape[:2]
        if (batch, tokens) not in self._spreads:
            fits = batch == 1 and tokens % self._peers.size == 0
            self._spreads[batch, tokens] = fits
            if fits:
                log.info("passes of %d tokens: residuals spread, exchanged by kernels", tokens)
            else:
                log.warning(
                    "passes of %d x %d tokens: partial products summed by collectives (kernels that exchange them "
                    "take one batch entry and a multiple of %d tokens)",
                    *(batch, tokens, self._peers.size),
                )
        return self._spreads[batch, tokens]

    def _partial(self, update: Tensor) -> Shared:
        partial = self._buffers.take("partial", update.shape, update.dtype)
        assert partial.here.data_ptr() == update.data_ptr(), "a partial product outside its room"
        return partial

    def _share(self, x: Tensor, update: Tensor) -> Tensor:
        """This rank's tokens of a residual that may still be whole."""
        if x.shape[1] != update.shape[1]:
            return x
        return x.chunk(self._peers.size, dim=1)[self._peers.rank]
