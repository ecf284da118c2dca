"""One JSON value per line."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

import orjson

from router_tuning.data.blocks import (
    BLOCK_BYTES,
    BOM,
    MAX_ROW_BYTES,
    SPACE,
    Block,
    Place,
    Typed,
    Unreadable,
    parse_slowly,
)


def line_blocks(stream: BinaryIO, start: Place, typed: Typed | None = None) -> Iterator[Block]:
    """Blocks of a JSONL stream that stands at ``start``; a line that is no JSON is an :class:`Unreadable` row.

    Lines end with LF or CRLF, the last one with the end of the stream; blank lines are no rows: a block may have none.
    """
    place, rest = start, b""
    while True:
        chunk = stream.read(BLOCK_BYTES)
        if place.offset == 0 and not rest and chunk.startswith(BOM):
            chunk, place = chunk[len(BOM) :], Place(len(BOM), 0)
        if not chunk:
            break
        end = chunk.rfind(b"\n") + 1
        if not end:
            rest += chunk
            if len(rest) > MAX_ROW_BYTES:
                block, rest = _skip_line(stream, len(rest), place)
                place = block.after
                yield block
            continue
        text, rest = b"".join((rest, memoryview(chunk)[:end])), chunk[end:]
        block = _block(text, place, typed)
        place = block.after
        yield block
    if rest.strip(SPACE):
        yield _block(rest, place, None)


def _block(text: bytes, before: Place, typed: Typed | None) -> Block:
    """The rows of whole lines; the end of the last one may be missing."""
    end = before.offset + len(text)
    # A line that is too large is seen by nobody but the parser.
    if typed is not None and len(text) <= MAX_ROW_BYTES and (rows := typed.lines(text)) is not None:
        after = Place(end, before.line + len(rows))
        return Block(partial(_values, text), after, lambda row: before.line + row + 1, rows)
    after = Place(end, before.line + text.count(b"\n") + (not text.endswith(b"\n")))
    rows, numbers = [], []
    for number, line in enumerate(text.split(b"\n"), before.line + 1):
        if line.strip(SPACE):
            rows.append(_parse(line))
            numbers.append(number)
    return Block(lambda: rows, after, numbers.__getitem__)


def _values(text: bytes) -> list[object]:
    return [_parse(line) for line in text.split(b"\n")[:-1]]


def _parse(line: bytes) -> object:
    if len(line) > MAX_ROW_BYTES:
        return _too_large(len(line))
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return parse_slowly(line)


def _too_large(size: int) -> Unreadable:
    return Unreadable("row_too_large", f"{size:,} bytes in one line, more than {MAX_ROW_BYTES >> 20} MiB")


def _skip_line(stream: BinaryIO, read: int, start: Place) -> tuple[Block, bytes]:
    """Pass over a line too long to keep, of which ``read`` bytes are read; the row's stand-in, and what follows it."""
    rest, ended = b"", False
    while not ended:
        chunk = stream.read(BLOCK_BYTES)
        end = chunk.find(b"\n") + 1
        ended = bool(end) or not chunk
        read += end or len(chunk)
        rest = chunk[end:] if end else b""
    row = _too_large(read)
    return Block(lambda: [row], Place(start.offset + read, start.line + 1), lambda _: start.line + 1), rest
