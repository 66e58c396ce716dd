"""AMF0, the little of it that RTMP commands use (Adobe, "Action Message Format -- AMF 0", 2007)."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TypeAlias

Value: TypeAlias = "float | bool | str | Mapping[str, Value] | list[Value] | None"

NUMBER, BOOLEAN, STRING, OBJECT, NULL, UNDEFINED, ECMA_ARRAY, END, ARRAY, DATE, LONG_STRING = (
    0, 1, 2, 3, 5, 6, 8, 9, 10, 11, 12,
)  # fmt: skip


class EcmaArray(dict[str, Value]):
    """Written as an ECMA array rather than as an object: what FLV's onMetaData is."""


def encode(*values: Value) -> bytes:
    """Values one after the other."""
    return b"".join(_encode(value) for value in values)


def _encode(value: Value) -> bytes:
    if value is None:
        return bytes([NULL])
    if isinstance(value, bool):
        return bytes([BOOLEAN, value])
    if isinstance(value, int | float):
        return bytes([NUMBER]) + struct.pack(">d", value)
    if isinstance(value, str):
        return bytes([STRING]) + _short(value)
    if isinstance(value, Mapping):
        head = struct.pack(">BI", ECMA_ARRAY, len(value)) if isinstance(value, EcmaArray) else bytes([OBJECT])
        return (
            head + b"".join(_short(key) + _encode(item) for key, item in value.items()) + bytes([0, 0, END])
        )
    raise TypeError(f"AMF0: {type(value).__name__} cannot be written")


def _short(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data


def decode(data: bytes) -> list[Value]:
    """All values of a message.

    Raises:
        ValueError: for a message that is cut or holds a type that commands do not use.
    """
    values, at = [], 0
    try:
        while at < len(data):
            value, at = _decode(data, at)
            values.append(value)
    except (struct.error, IndexError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"AMF0: broken message of {len(data)} bytes ({error})") from error
    return values


def _decode(data: bytes, at: int) -> tuple[Value, int]:
    kind, at = data[at], at + 1
    if kind in (NULL, UNDEFINED):
        return None, at
    if kind == NUMBER:
        return struct.unpack_from(">d", data, at)[0], at + 8
    if kind == BOOLEAN:
        return bool(data[at]), at + 1
    if kind == DATE:
        return struct.unpack_from(">d", data, at)[0], at + 10
    if kind in (STRING, LONG_STRING):
        return _text(data, at, 2 if kind == STRING else 4)
    if kind in (OBJECT, ECMA_ARRAY):
        return _pairs(data, at if kind == OBJECT else at + 4)
    if kind == ARRAY:
        return _items(data, at)
    raise ValueError(f"AMF0: type {kind} is not one of a command")


def _text(data: bytes, at: int, width: int) -> tuple[str, int]:
    size, at = int.from_bytes(data[at : at + width], "big"), at + width
    if at + size > len(data):
        raise IndexError("text is cut")
    return data[at : at + size].decode(), at + size


def _pairs(data: bytes, at: int) -> tuple[Value, int]:
    found: dict[str, Value] = {}
    while True:
        key, at = _text(data, at, 2)
        if not key and data[at] == END:
            return found, at + 1
        found[key], at = _decode(data, at)


def _items(data: bytes, at: int) -> tuple[Value, int]:
    count, at = struct.unpack_from(">I", data, at)[0], at + 4
    values: list[Value] = []
    for _ in range(count):
        value, at = _decode(data, at)
        values.append(value)
    return values, at
