"""Frames to NV12 to encoder to file or stream.

`open_sink(path, spec)` gives the sink that the file name asks for; `QueuedSink` runs any sink on a thread of
its own behind a bounded queue. Nothing heavy (torch, av) is imported until a sink is opened.
"""

from .open import open_outputs, open_sink
from .quality import Quality
from .queued import QueuedSink, QueueState
from .sink import Sink
from .spec import PixelFormat, VideoSpec, exact_fps
from .target import Target, check_target

__all__ = [
    "PixelFormat",
    "Quality",
    "QueueState",
    "QueuedSink",
    "Sink",
    "Target",
    "VideoSpec",
    "check_target",
    "exact_fps",
    "open_outputs",
    "open_sink",
]
