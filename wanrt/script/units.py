"""Durations, sizes, frame rates and other values as people write them.

Every reader takes what a TOML file or a flag may hold and returns the value, or raises `Expected`
with what would have been allowed. None of them guesses: a size that does not fit is refused, never rounded.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable
from fractions import Fraction

SIZE_STEP = 16  # VAE stride 8 times patch stride 2: width and height are multiples of it
SIZE_RANGE = (32, 4096)
FPS_RANGE = (1, 240)
SEED_RANGE = (0, 2**63 - 1)  # what torch.Generator.manual_seed takes without wrapping
LONGEST = Fraction(24 * 3600)  # seconds; a longer wish is nearly always a slip of the unit
MAX_TIMESTEP = 1000
MAX_CRF = 63  # of AV1 and VP9; H.264 and HEVC end at 51, which the encoder says

_UNITS = {
    "h": Fraction(3600),
    "m": Fraction(60),
    "min": Fraction(60),
    "s": Fraction(1),
    "ms": Fraction(1, 1000),
}
_NUMBER = r"(?:[0-9]{1,12}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})"
_PART = re.compile(rf"({_NUMBER})\s*(h|min|ms|m|s)\s*")
_SIZE = re.compile(r"\s*([0-9]{1,9})\s*[xX×*]\s*([0-9]{1,9})\s*")  # noqa: RUF001 (people type the sign)


class Expected(ValueError):  # noqa: N818 (it names what would have been right)
    """A value that does not fit. The message says what is allowed and, where known, the nearest valid one."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` that `word` most likely meant, or None when nothing is close."""
    table = {entry.lower(): entry for entry in known}
    found = difflib.get_close_matches(word.lower(), list(table), n=1, cutoff=0.6)
    return table[found[0]] if found else None


def number(value: object, expected: str) -> Fraction:
    """An int, a finite float, or text such as "0.5" or "30000/1001", as an exact fraction.

    A float means its shortest decimal form: 0.1 is one tenth.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Fraction):
        raise Expected(expected)
    if isinstance(value, float) and not math.isfinite(value):
        raise Expected(expected)
    if isinstance(value, int | Fraction):
        return _bounded(Fraction(value), expected)
    text = repr(value) if isinstance(value, float) else value.strip()
    if not re.fullmatch(rf"[+-]?(?:{_NUMBER}(?:[eE][+-]?[0-9]{{1,3}})?|[0-9]{{1,12}}/[0-9]{{1,12}})", text):
        raise Expected(expected)
    try:
        return _bounded(Fraction(text), expected)
    except ZeroDivisionError:
        raise Expected(expected) from None


def _bounded(n: Fraction, expected: str) -> Fraction:
    """`n`, refused beyond what a float holds with room to spare (TOML integers have no limit)."""
    if abs(n) > 10**18 or n.denominator > 10**18:
        raise Expected(expected)
    return n


def duration(value: object, *, zero: bool = False) -> Fraction:
    """Seconds of "5s", "1m30s", "750ms", "1.5s", "1h"; a bare number (or text of one) counts seconds.

    Raises `Expected` for anything else, for more than 24 h, for less than 1 ms, and for 0 unless `zero`.
    """
    expected = 'a duration such as "5s", "1m30s" or "750ms" (a bare number means seconds)'
    seconds = _duration_text(value) if isinstance(value, str) else None
    if seconds is None:
        seconds = number(value, expected)
    if seconds < 0 or (seconds == 0 and not zero):
        raise Expected(f"{expected}, more than 0")
    if seconds > LONGEST:
        raise Expected(f"{expected}, at most 24h")
    if 0 < seconds < Fraction(1, 1000):
        raise Expected(f"{expected}, at least 1ms")
    return seconds


def _duration_text(text: str) -> Fraction | None:
    """Seconds of "1h2m3s", or None when the text is not of that form or has a unit twice."""
    total, at, seen, text = Fraction(0), 0, set(), text.strip().lower()
    while at < len(text):
        part = _PART.match(text, at)
        if part is None or part[2] in seen:
            return None
        total += Fraction(part[1]) * _UNITS[part[2]]
        seen.add(part[2])
        at = part.end()
    return total if seen else None


def size(value: object) -> tuple[int, int]:
    """(width, height) in pixels of "832x480" or [832, 480]: multiples of 16, each from 32 to 4096."""
    width, height = _size_pair(value)
    low, high = SIZE_RANGE
    if all(low <= n <= high and n % SIZE_STEP == 0 for n in (width, height)):
        return width, height
    fits = f"{_fit(width)}x{_fit(height)}"
    raise Expected(f"width and height in multiples of {SIZE_STEP} from {low} to {high}; nearest: {fits}")


def _size_pair(value: object) -> tuple[int, int]:
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        return int(match[1]), int(match[2])
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    ):
        return value[0], value[1]
    raise Expected('a size as width x height, such as "832x480"')


def _fit(n: int) -> int:
    low, high = SIZE_RANGE
    return min(max((n + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP, low), high)


def fps(value: object) -> Fraction:
    """Frames per second, 1 to 240: 16, 23.976, "30000/1001". Exact: the file's rate is this fraction."""
    low, high = FPS_RANGE
    expected = f'frames per second from {low} to {high}, such as 16, 23.976 or "30000/1001"'
    rate = number(value, expected)
    if not low <= rate <= high or rate.denominator > 100_000:
        raise Expected(expected)
    return rate


def whole(value: object, low: int, high: int, what: str) -> int:
    """An integer from `low` to `high`; text of one is taken too, because flags are text."""
    expected = f"{what}, a whole number from {low} to {high}"
    if isinstance(value, str) and re.fullmatch(r"\s*\+?[0-9]{1,30}\s*", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Expected(expected)
    return value


def seed(value: object) -> int:
    """A seed, 0 to 2^63-1."""
    return whole(value, *SEED_RANGE, "a seed")


def between(value: object, low: float, high: float, what: str, *, above: bool = False) -> float:
    """A finite number from `low` (exclusive when `above`) to `high`."""
    expected = f"{what} {'above' if above else 'from'} {low:g}{', at most' if above else ' to'} {high:g}"
    n = float(number(value, expected))
    if not (low < n if above else low <= n) or n > high:
        raise Expected(expected)
    return n


def steps(value: object) -> int | tuple[float, ...]:
    """A number of denoising steps (1 to 50), or timesteps as the model sees them: from 1000 down, above 0.

    Text is "4" or "1000,937,833,625".
    """
    expected = (
        f"a number of steps (1 to 50) or falling timesteps from {MAX_TIMESTEP}, such as [1000, 937, 833, 625]"
    )
    if isinstance(value, str) and "," in value:
        value = [part for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        return whole(value, 1, 50, f"{expected}; the number is")
    times = tuple(float(number(t, expected)) for t in value)
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not 1 <= len(times) <= 50 or times[0] != MAX_TIMESTEP or not falling or times[-1] <= 0:
        raise Expected(expected)
    return times


def quality(value: object) -> float | str:
    """A quality from 0 (small) to 100 (visually lossless), or the encoder's own scale as "crf=18"."""
    expected = 'a quality from 0 to 100 (75 is usual), or the encoder\'s own scale such as "crf=18"'
    if isinstance(value, str) and (match := re.fullmatch(r"\s*crf\s*=\s*([0-9]{1,2}(?:\.[0-9])?)\s*", value)):
        if float(match[1]) > MAX_CRF:
            raise Expected(expected)
        return f"crf={match[1]}"
    n = float(number(value, expected))
    if not 0 <= n <= 100:
        raise Expected(expected)
    return n


def choice(value: object, known: Iterable[str], what: str) -> str:
    """One of the words in `known`."""
    words = tuple(known)
    if isinstance(value, str) and value in words:
        return value
    close = nearest(value, words) if isinstance(value, str) else None
    raise Expected(f"{what}: one of {', '.join(words)}" + (f"; did you mean {close}?" if close else ""))


def show(value: object, limit: int = 60) -> str:
    """`value` for a one-line message: quoted text, cut when long, never a newline."""
    if isinstance(value, str):
        text = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, dict):
        text = "a table"
    elif isinstance(value, int) and abs(value) >= 10**limit:
        return "a number of many digits"
    else:
        text = str(value)
    text = printable(text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """`text` on one line that a terminal shows as it is: what cannot be printed is escaped."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
