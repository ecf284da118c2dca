"""Rows and lines of a stretch, without converting it: what the stretches behind it need to know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from router_tuning.data.blocks import BOM, SPACE, newlines
from router_tuning.data.containers import ARROW, LINES
from router_tuning.data.planning import Stretch
from router_tuning.data.streams import open_bytes, reading

READ_BYTES = 1 << 17


def count(stretch: Stretch) -> tuple[int, int]:
    """Rows and newlines of a stretch that can be counted.

    Rows of lines are exact; those of an array are its separators and one, which an array of odd shape belies.
    """
    container = stretch.container
    if container.kind == ARROW:
        from router_tuning.data import tables  # pyarrow takes 60 MB, which only tables need

        with reading(container.path):
            return tables.arrow_rows(container.path), 0
    with reading(container.path), open_bytes(container.path, stretch.start, stretch.stop) as stream:
        if container.kind == LINES:
            if stretch.start == 0 and (head := stream.read(len(BOM))) != BOM:
                return _lines(_chunks(stream, head))
            return _lines(_chunks(stream))
        return _elements(_chunks(stream), container.separator)


def _chunks(stream: BinaryIO, head: bytes = b"") -> Iterator[bytes]:
    if head:
        yield head
    while chunk := stream.read(READ_BYTES):
        yield chunk


def _lines(chunks: Iterable[bytes]) -> tuple[int, int]:
    rows, lines, blank = 0, 0, True  # blank: the line at hand, so far
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            if blank and chunk[begin] in SPACE:
                blank = not chunk[begin:end].strip(SPACE)
                rows += not blank
            else:
                rows += 1
            lines += 1
            begin, blank = end + 1, True
        blank = blank and not chunk[begin:].strip(SPACE)
    return rows + (not blank), lines


def _elements(chunks: Iterable[bytes], separator: bytes) -> tuple[int, int]:
    rows, lines, tail = 1, 0, b""
    for chunk in chunks:
        lines += newlines(chunk)
        data = tail + chunk
        rows += data.count(separator)
        tail = data[-len(separator) + 1 :]  # too short to be counted twice
    return rows, lines
