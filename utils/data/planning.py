"""How the work on a data set is divided: stretches of its files that can be converted on their own.

Plain files are cut at row ends, which are looked for behind every so many bytes; nothing in between is read. That a
cut is between two rows is certain for lines. For an array it shows when the rows are parsed: a cut inside of a row
leaves a stretch that is no run of rows (see :mod:`router_tuning.data.reformat`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from router_tuning.data.containers import ARROW, LINES, PARQUET, Container
from router_tuning.data.streams import reading

VERSION = 2
"""Of rows and of what a run keeps of its progress; a run does not continue what another version began."""

STRETCH_BYTES = 8 << 20
STRETCH_ROWS = 1 << 13
"""Of tables: at least as many, unless the file has fewer, because they are cut between row groups only."""

SEARCH_BYTES = 1 << 14


@dataclass(frozen=True)
class Stretch:
    """What lies in a file from ``start`` to ``stop`` (None: its end): bytes after decompression, or rows of a table.

    ``rows``: how many, where the file says so.
    """

    container: Container
    start: int = 0
    stop: int | None = None
    rows: int | None = None

    @property
    def can_be_counted(self) -> bool:
        """Whether its rows can be counted before they are converted, for less than that takes."""
        return bool(self.container.separator) or self.container.kind == ARROW


def cut_file(container: Container) -> list[Stretch]:
    """Stretches of a file; a single one if it cannot be cut."""
    with reading(container.path):
        if container.is_table:
            return list(_table_stretches(container))
        cuts = list(_cuts(container)) if container.can_be_cut else []
        return [Stretch(container, start, stop) for start, stop in zip((0, *cuts), (*cuts, None), strict=True)]


def _table_stretches(container: Container) -> Iterator[Stretch]:
    if container.kind != PARQUET:
        yield Stretch(container)
        return
    from router_tuning.data import tables  # pyarrow takes 60 MB, which only tables need

    first = rows = 0
    for size in tables.parquet_groups(container.path):
        if rows >= STRETCH_ROWS:
            yield Stretch(container, first, first + rows, rows)
            first, rows = first + rows, 0
        rows += size
    yield Stretch(container, first, None, rows)


def _cuts(container: Container) -> Iterator[int]:
    """The first row end behind every ``STRETCH_BYTES`` bytes."""
    separator = container.separator
    lead = separator.index(b"\n" if container.kind == LINES else b",") + 1
    with container.path.open("rb") as file:
        size, found = os.fstat(file.fileno()).st_size, 0
        while (found := _find(file, separator, found + STRETCH_BYTES)) >= 0 and found + lead < size:
            yield found + lead


def _find(file: BinaryIO, pattern: bytes, start: int) -> int:
    """Where a pattern of bytes is next, from ``start``; -1 if it is not."""
    file.seek(start)
    data = b""
    while chunk := file.read(SEARCH_BYTES):
        data += chunk
        if (at := data.find(pattern)) >= 0:
            return start + at
        passed = max(0, len(data) - len(pattern) + 1)
        start, data = start + passed, data[passed:]
    return -1


@dataclass(frozen=True)
class Plan:
    """All stretches of a data set in their order; ``counting``: whether rows are what stands between separators."""

    stretches: list[Stretch]
    counting: bool = True

    def as_json(self) -> dict:
        """Also of the files as they are now."""
        paths = sorted({stretch.container.path for stretch in self.stretches})
        stretches = [[paths.index(one.container.path), one.start, one.stop, one.rows] for one in self.stretches]
        return {"version": VERSION, "files": _files(paths), "counting": self.counting, "stretches": stretches}

    @classmethod
    def of(cls, saved: dict, containers: Sequence[Container]) -> Plan | None:
        """From :meth:`as_json`, if this version made it, for these files as they are now."""
        by_path = {container.path: container for container in containers}
        paths = sorted(by_path)
        if saved.get("version") != VERSION or saved.get("files") != _files(paths):
            return None
        stretches = [Stretch(by_path[paths[file]], *numbers) for file, *numbers in saved["stretches"]]
        return cls(stretches, saved["counting"])


def _files(paths: Sequence[Path]) -> list[list]:
    states = [(path, os.stat(path)) for path in paths]
    return [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states]
