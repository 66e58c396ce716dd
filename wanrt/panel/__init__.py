"""The live panel, and its plain-line and JSON forms."""

from wanrt.panel.observer import MODES, Mode, Observer, logging_to, make_observer
from wanrt.panel.snapshot import (
    Live,
    LiveTarget,
    LoadStep,
    Memory,
    Phase,
    Queue,
    Snapshot,
    StageRow,
    Summary,
    Typed,
)
from wanrt.panel.sources import delay, memory_now, stage_rows

__all__ = [
    "MODES",
    "Live",
    "LiveTarget",
    "LoadStep",
    "Memory",
    "Mode",
    "Observer",
    "Phase",
    "Queue",
    "Snapshot",
    "StageRow",
    "Summary",
    "Typed",
    "delay",
    "logging_to",
    "make_observer",
    "memory_now",
    "stage_rows",
]
