"""What commands share: the panel's mode, and log lines that go through the panel while it is up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wanrt.errors import UsageError

if TYPE_CHECKING:
    from wanrt.panel import Mode, Observer


def preset_words() -> list[str]:
    """Names of the bundled models, for shell completion."""
    from wanrt.script import preset_names

    return list(preset_names())


def attention_words() -> list[str]:
    """What may compute attention, for shell completion."""
    from wanrt.script.job import ATTENTIONS

    return list(ATTENTIONS)


def panel_mode(*, quiet: bool, plain: bool, json_progress: bool) -> Mode:
    """The one mode that the flags ask for; "auto" without any. Raises UsageError for two at once."""
    asked: dict[Mode, bool] = {"quiet": quiet, "plain": plain, "json": json_progress}
    chosen: list[Mode] = [mode for mode, given in asked.items() if given]
    if len(chosen) > 1:
        raise UsageError("got more than one of --quiet, --plain and --json-progress: choose one")
    return chosen[0] if chosen else "auto"


@contextmanager
def observing(mode: Mode) -> Iterator[Observer]:
    """An observer in `mode`, to be closed by whoever runs. What is logged inside the block goes through it."""
    from wanrt.panel import logging_to, make_observer

    observer = make_observer(mode)
    with logging_to(observer, logging.getLogger("wanrt").getEffectiveLevel()):
        yield observer
