"""A benchmark as a list of cells, each appended to a JSON-lines file at once: whatever cuts it short costs one cell.

The file is a journal: a line that says what ran (``run``), a line per row (``cell``, ``seconds`` that its cell took,
and what was measured), a line with ``failed`` for a cell that could not run, one with ``not_started`` for what the
time did not suffice for. A later run on the same device, with the same settings, goes on with what is missing.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from router_tuning.files import append_json, read_json_lines

Row = dict[str, Any]
ALIKE = ("device", "settings")
"""What runs have in common that measure the same."""


class Cell(NamedTuple):
    """Something to measure: ``run`` gives its rows. Cells of one ``kind`` take about the same time."""

    name: str
    kind: str
    run: Callable[[], list[Row]]


def run_cells(cells: Iterable[Cell], path: Path, about: Row, minutes: float = math.inf) -> Iterator[Row]:
    """Run the cells that the journal lacks, in order, and yield each row when it has been written.

    Args:
        path: the journal, which is appended to.
        about: describes this run; what was measured under others of :data:`ALIKE` counts as missing.
        minutes: no cell starts that is expected to end later than this after the call: the first of a kind is expected
            to take as long as the longest of all before.
    """
    start = time.perf_counter()
    done = {row["cell"] for row in measured(read_json_lines(path), about)}
    longest: dict[str, float] = {}
    late = []
    gc.freeze()  # what is there now stays: cells collect their own alone
    append_json(path, {"run": about})
    for cell in (cell for cell in cells if cell.name not in done):
        began = time.perf_counter()
        expected = longest.get(cell.kind, max(longest.values(), default=0.0))
        if began - start + expected > 60 * minutes:
            late.append(cell.name)
            continue
        try:
            rows = cell.run()
        except Exception as error:
            rows = [{"failed": f"{type(error).__name__}: {error}"[:500]}]
        free_memory()
        took = time.perf_counter() - began
        longest[cell.kind] = max(longest.get(cell.kind, 0.0), took)
        for row in rows:
            append_json(path, told := {"cell": cell.name, "seconds": took, **row})
            yield told
    if late:
        append_json(path, {"not_started": late, "minutes": minutes})
    gc.unfreeze()


def measured(rows: list[Row], like: Row | None = None) -> list[Row]:
    """Rows that hold a measurement, each with the ``device`` of its run; of runs :data:`ALIKE` one alone, if named."""
    found, about = [], {}
    for row in rows:
        about = row.get("run", about)
        if "cell" in row and "failed" not in row and all(like is None or like.get(k) == about.get(k) for k in ALIKE):
            found.append({**row, "device": about["device"]})
    return found


def free_memory() -> None:
    """Let go of what no longer has a name: models whose parts hold references to each other, and their memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
