"""How the work on a data set is divided: stretches of its files that can be converted on their own.

A row's id holds its number in the data set, so a stretch can only start once the rows before it are counted. Plain
files are cut at row ends, counting the separators; the count is checked when the rows are parsed (see
:mod:`utils.data.reformat`), so a count that an odd file leads astray costs time and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from utils.data.blocks import SPACE, Place, newlines
from utils.data.containers import LINES, PARQUET, Container
from utils.data.streams import open_bytes, reading

VERSION = 1
"""Of rows and parts; a run does not continue what another version began."""

UNIT_BYTES = 64 << 20
UNIT_ROWS = 1 << 16
READ_BYTES = 1 << 17
BLANK = frozenset(SPACE)
"""What every blank line starts with; lines that start with white space are taken for one, too."""


@dataclass(frozen=True)
class Unit:
    """Rows of one file from ``start`` to ``stop`` (None: its end); ``rows`` of them, None where nobody counted."""

    container: Container
    start: Place = Place()
    stop: int | None = None
    rows: int | None = None


def whole_files(containers: Sequence[Container]) -> list[Unit]:
    """One unit per file, uncounted: for conversion one after the other."""
    return [Unit(container) for container in containers]


def cut_file(container: Container) -> list[Unit]:
    """Units of a file, counted, for conversion side by side; a single uncounted one if it cannot be counted."""
    with reading(container.path):
        if container.is_table:
            return list(_table_units(container))
        size = None if container.compressed else os.path.getsize(container.path)
        with open_bytes(container.path) as stream:
            return _text_units(container, stream, size)


def _table_units(container: Container) -> Iterator[Unit]:
    from utils.data import tables  # pyarrow takes 60 MB, which only tables need

    if container.kind != PARQUET:
        yield Unit(container, rows=tables.arrow_rows(container.path))
        return
    first = rows = 0
    for size in tables.parquet_groups(container.path):
        if rows and rows + size > UNIT_ROWS:
            yield Unit(container, Place(first, first), first + rows, rows)
            first, rows = first + rows, 0
        rows += size
    yield Unit(container, Place(first, first), None, rows)


def _text_units(container: Container, stream: BinaryIO, size: int | None) -> list[Unit]:
    if not container.separator:
        return [Unit(container)]
    counter = _Counter(container, cut=size is not None)
    while chunk := stream.read(READ_BYTES):
        if not counter.add(chunk):
            return [Unit(container)]
    return counter.finish()


class _Counter:
    """Counts separators and newlines of a text that comes in chunks, and cuts it every ``UNIT_BYTES``."""

    def __init__(self, container: Container, cut: bool) -> None:
        self._container, self._cut = container, cut
        self._separator = container.separator
        self._lead = self._separator.index(b"\n" if container.kind == LINES else b",") + 1
        self._data, self._base = b"", 0  # the data at hand, and where in the text they start
        self._counted = 0  # separators that start before here are counted
        self._rows, self._lines, self._lines_to = 0, 0, 0
        self._start, self._units = Place(), []

    def add(self, chunk: bytes) -> bool:
        """Take a chunk; False if the text has blank lines, so that separators do not count its rows."""
        data = self._data + chunk
        if self._container.kind == LINES and (_blank_line(data) or self._starts_blank(data)):
            return False
        limit = self._start.offset + UNIT_BYTES
        while self._cut and (found := data.find(self._separator, max(0, limit - self._base))) >= 0:
            self._count(data, found + len(self._separator))
            self._count_lines(data, found + self._lead)
            self._emit(self._base + found + self._lead)
            limit = self._start.offset + UNIT_BYTES
        self._count(data, len(data))
        keep = max(0, len(data) - len(self._separator))
        # What is kept may hold the next cut, whose lines are those before it: not counted yet.
        self._count_lines(data, keep)
        self._data, self._base = data[keep:], self._base + keep
        return True

    def finish(self) -> list[Unit]:
        """The units; the last one goes to the end of the text."""
        unended = self._container.kind != LINES or not self._data.endswith(b"\n")
        last = Unit(self._container, self._start, None, self._rows + unended)
        if self._units and self._container.kind == LINES and not last.rows:
            return [*self._units[:-1], replace(self._units[-1], stop=None)]
        return [*self._units, last]

    def _starts_blank(self, data: bytes) -> bool:
        return self._base == 0 and data[0] in BLANK

    def _count(self, data: bytes, end: int) -> None:
        begin = max(0, self._counted - self._base)
        if self._container.kind == LINES:
            found = newlines(memoryview(data)[begin:end])
            self._lines += found
        else:
            found = data.count(self._separator, begin, end)
        self._rows += found
        self._counted = max(self._counted, self._base + end - len(self._separator) + 1)

    def _count_lines(self, data: bytes, end: int) -> None:
        begin = self._lines_to - self._base
        if end > begin and self._container.kind != LINES:
            self._lines += newlines(memoryview(data)[begin:end])
            self._lines_to = self._base + end

    def _emit(self, cut: int) -> None:
        self._units.append(Unit(self._container, self._start, cut, self._rows))
        self._start, self._rows = Place(cut, self._lines), 0


def _blank_line(data: bytes) -> bool:
    """Whether a line that starts in the data, but not the first one of them, starts blank."""
    end, last = data.find(b"\n"), len(data) - 1
    while 0 <= end < last:
        if data[end + 1] in BLANK:
            return True
        end = data.find(b"\n", end + 1)
    return False


def plan_of(units: Sequence[Unit]) -> dict:
    """Units, and the files as they are now, as JSON; see :func:`resumed_units`."""
    paths = sorted({unit.container.path for unit in units})
    stretches = [
        [paths.index(unit.container.path), unit.start.offset, unit.start.line, unit.stop, unit.rows] for unit in units
    ]
    return {"version": VERSION, "files": _files(paths), "units": stretches}


def resumed_units(plan: dict, containers: Sequence[Container]) -> list[Unit] | None:
    """The units of a plan, if it was made by this version for these files as they are now."""
    by_path = {container.path: container for container in containers}
    paths = sorted(by_path)
    if plan.get("version") != VERSION or plan.get("files") != _files(paths):
        return None
    return [
        Unit(by_path[paths[file]], Place(offset, line), stop, rows) for file, offset, line, stop, rows in plan["units"]
    ]


def _files(paths: Sequence[Path]) -> list[list]:
    states = [(path, os.stat(path)) for path in paths]
    return [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states]
