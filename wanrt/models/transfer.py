"""From the host to a device without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, in the current stream's order.

    From pageable memory PyTorch's copy holds the host until the stream has done all it was given: a new prompt would
    wait for a whole chunk, and the device then for the host.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
