"""Spans, bubbles, stats and trace export."""

from wanrt.telemetry.clocks import CudaClock, clock_for
from wanrt.telemetry.recorder import Recorder
from wanrt.telemetry.spans import Mark, Span
from wanrt.telemetry.stats import Spread, StageStats, Stats

__all__ = ["CudaClock", "Mark", "Recorder", "Span", "Spread", "StageStats", "Stats", "clock_for"]
