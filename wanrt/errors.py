"""The error tree of wanrt.

    WanrtError            exit code 1: something failed at run time
    ├── RunError          a stage, rank, encoder or device failed
    ├── OutputError       a file or stream could not be written
    └── UsageError        exit code 2: wrong use or wrong input
        ├── ScriptError   prompt.toml or a preset
        └── WeightsError  a checkpoint that is missing, foreign or damaged

Every message is one line: what was got, what was expected, what to do next.
"""

from __future__ import annotations


class WanrtError(Exception):
    """Base of every error that wanrt raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class RunError(WanrtError):
    """A stage, a rank or a device failed while a video was being made."""


class OutputError(WanrtError):
    """A file or a stream could not be written."""


class UsageError(WanrtError):
    """The command, the file or the value given is wrong; nothing was started."""

    exit_code = 2


class ScriptError(UsageError):
    """A prompt file or preset is wrong. Several findings are joined by newlines, one line each."""


class WeightsError(UsageError):
    """A checkpoint is missing, not what it was taken for, or damaged."""
