"""What the tables read: results by cell, and means over seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from router_tuning.experiments.plan import Cell, Plan

Json = dict[str, Any]


def mean_sd(values: Iterable[float | None]) -> Json | None:
    """``{"mean", "sd", "n"}`` of what is there (sd None for one value); None if nothing is."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    return {
        "mean": round(statistics.fmean(found), 4),
        "sd": round(statistics.stdev(found), 4) if len(found) > 1 else None,
        "n": len(found),
    }


class Cells:
    """Results by cell; None for one that has not run."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.seen: dict[str, Json | None] = {}

    def __call__(self, *args: Any) -> Json | None:
        name = Cell(*args).name
        if name not in self.seen:
            path = self.folder / f"{name}.json"
            self.seen[name] = json.loads(path.read_text()) if path.is_file() else None
        return self.seen[name]

    def over_seeds(
        self, kind: str, recipe: str | None, granularity: str, capacity: Any, read: Callable
    ) -> Json | None:
        """Mean and deviation over the plan's seeds of what ``read`` takes from a cell."""
        found = [self(kind, recipe, granularity, seed, capacity) for seed in self.plan.seeds]
        return mean_sd(read(cell) for cell in found if cell is not None)


def exact(cell: Json) -> float:
    """Average exact match of free-running generation."""
    return cell["generation"]["exact_match"]["average"]


def optional(*keys: str) -> Callable[[Json], float | None]:
    def read(cell: Json) -> float | None:
        value: Any = cell
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read
