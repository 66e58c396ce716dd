"""Numbers and texts as the panel, the plain lines and the summary print them."""

from __future__ import annotations

import unicodedata

UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def clock_time(seconds: float | None) -> str:
    """`0:07`, `12:34`, `1:02:03`; `-:--` when unknown."""
    if seconds is None:
        return "-:--"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(fps: float | None) -> str:
    """Frames per second with three significant digits; `-` when unknown."""
    if fps is None:
        return "-"
    return f"{fps:.0f}" if fps >= 99.95 else f"{fps:.1f}" if fps >= 9.995 else f"{fps:.2f}"


def size(count: int) -> str:
    """Bytes in binary units with three significant digits: `921 B`, `1.82 MiB`, `61.3 GiB`."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {UNITS[unit]}"


def of_size(part: int, whole: int | None) -> str:
    """`61.3/80.0 GiB`: a part of a size, in the unit of the whole."""
    if not whole:
        return size(part)
    number, unit = size(whole).split()
    digits = len(number.partition(".")[2])
    return f"{part / 1024 ** UNITS.index(unit):.{digits}f}/{number} {unit}"


def milliseconds(value: float | None) -> str:
    """`57 ms`, `4.2 ms`, `1.25 s`; `-` when unknown."""
    if value is None:
        return "-"
    if value >= 999.5:
        return f"{value / 1000:.2f} s"
    return f"{value:.0f} ms" if value >= 9.95 else f"{value:.1f} ms"


def seconds(value: float | None) -> str:
    """`0.42 s`, `7.1 s`, `95 s`; `-` when unknown."""
    if value is None:
        return "-"
    return f"{value:.0f} s" if value >= 59.95 else f"{value:.1f} s" if value >= 0.995 else f"{value:.2f} s"


def percent(share: float) -> str:
    """`92 %`; 100 only when nothing is missing."""
    whole = round(share * 100)
    return f"{99 if whole == 100 and share < 1 else whole} %"


def visible(text: str) -> str:
    """`text` with a space for everything that a terminal would obey."""
    return "".join(" " if unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} else c for c in text)


def one_line(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal would obey."""
    return " ".join(visible(text).split())


def clipped(text: str, length: int) -> str:
    """`text` in at most `length` characters, with three dots where it was cut."""
    return text if len(text) <= length else text[: length - 3].rstrip() + "..."
