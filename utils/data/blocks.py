"""Blocks of rows: what every container is read as, so that memory does not depend on its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

BLOCK_BYTES = 1 << 17
"""Bytes read at a time. Small enough that a block, its rows and what is made of them stay in the processor's cache:
measured on 2 KB rows, 128 KiB are converted 1.6 times as fast as 2 MiB."""

MAX_ROW_BYTES = 16 << 20
"""Larger rows are refused: a row must fit into memory with all that is made of it."""

EXCERPT = 1000
"""Bytes of an unreadable row that are shown."""

BOM = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"
"""White space of JSON; ``bytes.strip()`` alone would also take form feeds and the like."""


@dataclass(frozen=True)
class Unreadable:
    """Stands in a block for what should have been a row: ``reason`` as in :mod:`router_tuning.data.policy`."""

    reason: str
    detail: str
    text: str = ""

    @classmethod
    def of(cls, reason: str, detail: str, raw: bytes | str) -> Unreadable:
        """With the beginning of the row; what is no text in it is written as escapes."""
        start = raw[:EXCERPT] if isinstance(raw, bytes) else raw[:EXCERPT].encode("utf-8", "surrogateescape")
        return cls(reason, detail, start.decode("utf-8", "backslashreplace"))


@dataclass(frozen=True)
class Place:
    """Where a reader stands: bytes after decompression (rows, for a table) and lines before it."""

    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Block:
    """Consecutive rows; ``after`` is where the next block starts, ``line_of(i)`` the source line of row ``i``.

    ``typed``: the rows as :mod:`fast_lane` reads them, where it can read them all. ``parse`` makes the
    parsed values of the rows, which are only needed where the fast lane does not take them.
    """

    parse: Callable[[], list[object]] = field(repr=False)
    after: Place
    line_of: Callable[[int], int] = field(repr=False)
    typed: list | None = field(default=None, repr=False)

    @cached_property
    def rows(self) -> list[object]:
        """Parsed values, or :class:`Unreadable`."""
        return self.parse()

    def __len__(self) -> int:
        return len(self.rows if self.typed is None else self.typed)


class Typed(Protocol):
    """What reads a block of JSON text in one go: its rows, or None if any of them needs a closer look."""

    def lines(self, text: bytes) -> list | None:
        """Of whole lines, each with its end."""

    def array(self, text: bytes) -> list | None:
        """Of an array in its brackets."""


def parse_slowly(raw: bytes) -> object:
    """Parse what the fast parser refused: a value (NaN is read, as the standard library does) or why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"byte {error.start} of the row is 0x{raw[error.start]:02x}"
        return Unreadable.of("invalid_utf8", detail, raw)
    try:
        return json.loads(text, parse_int=whole_number)
    except json.JSONDecodeError as error:
        return Unreadable.of("not_json", f"{error.msg} at character {error.pos} of {len(text)}", raw)
    except (RecursionError, ValueError) as error:
        return Unreadable.of("not_json", str(error), raw)


def whole_number(digits: str) -> int | float:
    """A number of any length; Python makes no integer of more than some thousand digits."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)


def newlines(text: bytes | memoryview) -> int:
    """How many there are; ``bytes.count`` takes four times as long."""
    return int(np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n")))
