"""Python's garbage collector, kept out of a stream's way."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leaves what exists now out of garbage collections until the block ends.

    The libraries' 180,000 objects outlive every stream. To walk them all takes a collection 35 ms, or 85 to 180 in
    a rank's process that has just captured its graphs (PyTorch 2.11 to 2.13), and no thread of the process gets on
    meanwhile: frames come late, and a mesh whose chunks are as short waits.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
