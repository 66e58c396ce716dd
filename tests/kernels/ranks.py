"""Ranks that share memory, played by tensors of one process."""

from __future__ import annotations

import torch

from wanrt_kernels.shared import Shared


def among(tensors, rank):
    """What rank `rank` knows of one tensor a rank."""
    addresses = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
    return Shared(tensors[rank], addresses.to(tensors[rank].device))
