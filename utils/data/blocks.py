"""Blocks of rows: what every container is read as, so that memory does not depend on its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

BLOCK_BYTES = 1 << 21
"""Bytes read at a time; parsed rows take a few times that."""

MAX_ROW_BYTES = 16 << 20
"""Larger rows are refused: a row must fit into memory with all that is made of it."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Unreadable:
    """Stands in a block for what should have been a row: ``reason`` as in :mod:`utils.data.policy`."""

    reason: str
    detail: str


@dataclass(frozen=True)
class Place:
    """Where a reader stands: bytes after decompression (rows, for a table) and lines before it."""

    offset: int = 0
    line: int = 0


@dataclass(frozen=True)
class Block:
    """Consecutive rows; ``after`` is where the next block starts, ``line_of(i)`` the source line of ``rows[i]``."""

    rows: list[object]
    after: Place
    line_of: Callable[[int], int] = field(repr=False)


def parse_slowly(raw: bytes) -> object:
    """Parse what the fast parser refused: a value (NaN is read, as the standard library does) or why there is none."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable("invalid_utf8", f"byte {error.start} of the row is 0x{raw[error.start]:02x}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return Unreadable("not_json", f"{error.msg} at character {error.pos} of {len(text)}")
    except (RecursionError, ValueError) as error:
        return Unreadable("not_json", str(error))
