"""One JSON value per line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import orjson

from utils.data.blocks import BLOCK_BYTES, BOM, MAX_ROW_BYTES, SPACE, Block, Place, Unreadable, parse_slowly


def line_blocks(stream: BinaryIO, start: Place) -> Iterator[Block]:
    """Blocks of a JSONL stream that stands at ``start``; a line that is no JSON is an :class:`Unreadable` row.

    Lines end with LF or CRLF, the last one with the end of the stream; blank lines are no rows.
    """
    place, rest = start, b""
    while True:
        chunk = stream.read(BLOCK_BYTES)
        if place.offset == 0 and not rest and chunk.startswith(BOM):
            chunk, place = chunk[len(BOM) :], Place(len(BOM), 0)
        if not chunk:
            break
        # Only the first and the last line of a chunk are ever copied whole: this loop sees every byte of the input.
        lines = chunk.split(b"\n")
        if len(lines) == 1:
            rest += chunk
            if len(rest) > MAX_ROW_BYTES:
                block, rest = _skip_line(stream, len(rest), place)
                place = block.after
                yield block
            continue
        after = Place(place.offset + len(rest) + len(chunk) - len(lines[-1]), place.line + len(lines) - 1)
        lines[0], rest = rest + lines[0], lines.pop()
        block = _block(lines, place.line, after)
        place = after
        if block.rows:
            yield block
    if rest.strip(SPACE):
        yield _block([rest], place.line, Place(place.offset + len(rest), place.line + 1))


def _block(lines: list[bytes], before: int, after: Place) -> Block:
    """The rows of whole lines, of which ``before`` precede them."""
    try:
        return Block(list(map(orjson.loads, lines)), after, lambda row: before + row + 1)
    except orjson.JSONDecodeError:
        pass
    rows, numbers = [], []
    for number, line in enumerate(lines, before + 1):
        if line.strip(SPACE):
            rows.append(_parse(line))
            numbers.append(number)
    return Block(rows, after, numbers.__getitem__)


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
    return Block([_too_large(read)], Place(start.offset + read, start.line + 1), lambda _: start.line + 1), rest
