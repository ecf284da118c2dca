"""Tables and figures of an experiment, from the JSON of its cells alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.evaluation.dynamics import dynamics
from utils.evaluation.experiments_figures import dial_figure, quality_figure
from utils.evaluation.experiments_plan import MATCH, OWN, Cell, Plan
from utils.evaluation.experiments_tables import markdown
from utils.evaluation.oracle import at_budget
from utils.evaluation.output import write_json, write_text

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


def build(plan: Plan, results: Path, figures: Path) -> list[Path]:
    """Write ``main_results``, ``dial``, ``pareto`` and ``dynamics`` for what has run; returns the files."""
    cells = _Cells(plan, results)
    main = main_results(plan, cells)
    written = [write_json(figures / f"{plan.name}_results.json", main)]
    written.append(write_text(figures / f"{plan.name}_results.md", markdown(main)))
    dial = dial_results(plan, cells)
    if any(dial["series"].values()):
        written.append(write_json(figures / f"{plan.name}_dial.json", dial))
        written.append(dial_figure(dial, figures / f"{plan.name}_dial.svg"))
    pareto = pareto_results(plan, cells)
    if pareto["points"]:
        written.append(write_json(figures / f"{plan.name}_pareto.json", pareto))
        written.append(quality_figure(pareto, figures / f"{plan.name}_pareto.svg"))
    report = dynamics_results(plan, cells, main)
    if report["cells"]:
        written.append(write_json(figures / f"{plan.name}_dynamics.json", report))
    return written


class _Cells:
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


def _optional(*keys: str) -> Callable[[Json], float | None]:
    def read(cell: Json) -> float | None:
        value: Any = cell
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return read


def static_part(granularity: str) -> str:
    """The part or parts of a granularity, as static cells name them: ``attn_token+mlp_token`` → ``attn+mlp``."""
    return "+".join(name.split("_")[0] for name in granularity.split("+"))


def main_results(plan: Plan, cells: _Cells) -> Json:
    """Every number of the main table, with those that it is judged by."""
    dense, masks = cells("dense"), cells("masks")
    ours = [name for name in plan.grid_recipes if plan.has_dial(name)]
    theirs = [name for name in plan.grid_recipes if not plan.has_dial(name)]
    rows = []
    for granularity in plan.granularities:
        for budget in plan.budgets:
            for recipe in ours:
                rows.append(_row(plan, cells, granularity, budget, recipe))
    published = [
        _published(cells, granularity, recipe, ours) for granularity in plan.granularities for recipe in theirs
    ]
    result: Json = {
        "plan": plan.name,
        "base": plan.base,
        "seeds": plan.seeds,
        "dense": None if dense is None else _dense(dense),
        "rows": [row for row in rows if row["exact_match"]],
        "published": [row for row in published if row["exact_match"]],
        "others": _others(plan, cells),
        "provenance": None if dense is None else dense["provenance"],
        "command": f"python entrypoints/analysis/experiments.py configs/experiments/{plan.name}.yaml",
    }
    if masks is not None:
        result["oracle"] = masks["oracle"]
        result["static_fresh"] = masks["static_fresh"]
        result["static_same_items"] = masks["static_same_items"]
    return result


def _dense(cell: Json) -> Json:
    return {
        "exact_match": cell["generation"]["exact_match"],
        "choices": cell["choices"]["average"],
        "perplexity": cell["text"]["perplexity"],
    }


def _row(plan: Plan, cells: _Cells, granularity: str, budget: float, recipe: str) -> Json:
    def over(read: Callable) -> Json | None:
        return cells.over_seeds("score", recipe, granularity, budget, read)

    row = {
        "granularity": granularity,
        "recipe": recipe,
        "budget": budget,
        "capacity": over(lambda cell: cell["conversations"]["total"]),
        "worst_capacity_error": _worst(plan, cells, recipe, granularity, budget),
        "capacity_prompt": over(_optional("generation", "capacity", "prompt")),
        "capacity_generated": over(_optional("generation", "capacity", "generated")),
        "capacity_by_task": {task: over(_optional("generation", "capacity_by_task", task)) for task in plan.tasks},
        "exact_match": over(exact),
        "choices": over(_optional("choices", "average")),
        "perplexity": over(_optional("text", "perplexity")),
        "capacity_text": over(_optional("text", "capacity")),
        "random": cells.over_seeds("random", None, granularity, budget, exact),
        "static": static_at(plan, cells, granularity, budget),
    }
    masks = cells("masks")
    if granularity == "attn_sequence" and masks is not None and row["exact_match"]:
        oracle = masks["oracle"][f"{budget:g}"]
        static = at_budget([entry["exact_match"] for entry in masks["static_fresh"]], budget)
        row["oracle"], row["static"] = oracle, static
        room = oracle - static
        row["whole_answer"] = over(_optional("conversations", "whole_answer"))
        found = row["whole_answer"]
        row["recovered"] = round((found["mean"] - static) / room, 3) if found and room > 0 else None
    return row


def _worst(plan: Plan, cells: _Cells, recipe: str, granularity: str, budget: float) -> float | None:
    found = [cells("score", recipe, granularity, seed, budget) for seed in plan.seeds]
    errors = [abs(cell["conversations"]["total"] - budget) for cell in found if cell is not None]
    return round(max(errors), 4) if errors else None


def static_at(plan: Plan, cells: _Cells, granularity: str, budget: float) -> float | None:
    """Exact match of the fixed masks of this part at a budget; between two sizes, of their mixture."""
    part = static_part(granularity)
    cell = cells("static", plan.statics.get(part), part)
    if cell is None:
        return None
    place = budget * cell["routers"]
    lower, upper = int(place), -int(-place // 1)
    sizes = cell["sizes"]
    if str(lower) not in sizes or str(upper) not in sizes:
        return None
    low, high = (sizes[str(size)]["exact_match"]["average"] for size in (lower, upper))
    return round(low + (place - lower) * (high - low), 4)


def _published(cells: _Cells, granularity: str, recipe: str, ours: list[str]) -> Json:
    row: Json = {"granularity": granularity, "recipe": recipe}
    for name, read in (
        ("capacity", lambda cell: cell["conversations"]["total"]),
        ("exact_match", exact),
        ("choices", _optional("choices", "average")),
        ("perplexity", _optional("text", "perplexity")),
    ):
        row[name] = cells.over_seeds("score", recipe, granularity, OWN, read)
    for other in ours:
        row[f"{other}_at_its_capacity"] = cells.over_seeds("score", other, granularity, MATCH, exact)
    return row


def _others(plan: Plan, cells: _Cells) -> list[Json]:
    rows = []
    for entry in plan.extra:
        cell = cells("score", entry["recipe"], entry["granularity"], plan.seeds[0], OWN)
        if cell is not None:
            rows.append(
                {
                    **entry,
                    "capacity": cell["conversations"]["total"],
                    "exact_match": exact(cell),
                    "choices": cell["choices"]["average"],
                    "perplexity": cell["text"]["perplexity"],
                }
            )
    for part, method in plan.statics.items():
        cell = cells("static", method, part)
        for size, found in {} if cell is None else cell["sizes"].items():
            share = int(size) / cell["routers"]
            name = {"recipe": f"static, {method}", "granularity": part, "kept": found["kept"]}
            rows.append({**name, "capacity": share, "exact_match": found["exact_match"]["average"]})
    return rows


def dial_results(plan: Plan, cells: _Cells) -> Json:
    """Requested against reached capacity, and quality, of one trained router per granularity."""
    dense, seed, series = cells("dense"), plan.seeds[0], {}
    for granularity in plan.granularities:
        for recipe in filter(plan.has_dial, plan.grid_recipes):
            points = []
            for budget in sorted({*plan.dial, *plan.budgets}):
                cell = cells("score", recipe, granularity, seed, budget)
                if cell is not None:
                    reached = cell["conversations"]["total"]
                    points.append({"budget": budget, "capacity": reached, "exact_match": exact(cell)})
            series[granularity] = points
    return {"seed": seed, "dense": None if dense is None else exact(dense), "series": series}


def pareto_results(plan: Plan, cells: _Cells) -> Json:
    """Quality against measured time relative to dense, where a cost cell has run."""
    points = []
    for granularity in plan.granularities:
        for recipe in filter(plan.has_dial, plan.grid_recipes):
            for budget in plan.budgets:
                cost = cells("cost", recipe, granularity, plan.seeds[0], budget)
                score = cells("score", recipe, granularity, plan.seeds[0], budget)
                if cost is not None and score is not None:
                    name = {"system": recipe, "granularity": granularity, "budget": budget}
                    points.append({**name, "exact_match": exact(score), **_times(cost)})
    for part, method in plan.statics.items():
        for budget in plan.budgets:
            cost = cells("cost", method, part, None, budget)
            score = static_at(plan, cells, part, budget)
            if cost is not None and score is not None:
                name = {"system": f"static, {method}", "granularity": part, "budget": budget}
                points.append({**name, "exact_match": score, **_times(cost)})
    dense = cells("dense")
    return {"dense": None if dense is None else exact(dense), "points": points}


def _times(cost: Json) -> Json:
    found = cost["cost"]
    return {
        "flops_share": found["flops_share"],
        "prefill_time": found["prefill"]["time_ratio"],
        "generate_time": found["generate"]["time_ratio"],
    }


def dynamics_results(plan: Plan, cells: _Cells, main: Json) -> Json:
    """Entropy and task information of the decisions at sequence level, beside the gain over static and random."""
    found = []
    for granularity in plan.granularities:
        for recipe in filter(plan.has_dial, plan.grid_recipes):
            for budget in plan.budgets:
                cell = cells("score", recipe, granularity, plan.seeds[0], budget)
                decisions = None if cell is None else cell["generation"].get("decisions")
                if not decisions:
                    continue
                row = next(
                    r
                    for r in main["rows"]
                    if (r["granularity"], r["recipe"], r["budget"]) == (granularity, recipe, budget)
                )
                score = exact(cell)
                gains = {
                    "gain_over_static": None if row["static"] is None else round(score - row["static"], 4),
                    "gain_over_random": None if row["random"] is None else round(score - row["random"]["mean"], 4),
                }
                name = {"granularity": granularity, "recipe": recipe, "budget": budget}
                found.append({**name, **gains, **dynamics(decisions)})
    return {"seed": plan.seeds[0], "cells": found}
