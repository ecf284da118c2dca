"""Tables and figures of an experiment, from the JSON of its cells alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from router_tuning.evaluation.dynamics import dynamics
from router_tuning.experiments.cells import Cells, Json, exact, optional
from router_tuning.experiments.figures import dial_figure, quality_figure
from router_tuning.experiments.oracle import at_budget
from router_tuning.experiments.plan import MATCH, OWN, Plan
from router_tuning.experiments.side_tables import SCORES, build_tables
from router_tuning.experiments.tables import markdown
from router_tuning.files import write_json, write_text


def build(plan: Plan, results: Path, figures: Path) -> list[Path]:
    """Write ``results``, ``dial``, ``pareto``, ``dynamics`` and side tables for what has run; returns the files."""
    cells = Cells(plan, results)
    main = main_results(plan, cells)
    written = [write_json(figures / f"{plan.name}_results.json", main)]
    written.append(write_text(figures / f"{plan.name}_results.md", markdown(main)))
    dial = dial_results(plan, cells)
    if plan.dial and any(dial["series"].values()):
        written.append(write_json(figures / f"{plan.name}_dial.json", dial))
        written.append(dial_figure(dial, figures / f"{plan.name}_dial.svg"))
    pareto = pareto_results(plan, cells)
    if pareto["points"]:
        written.append(write_json(figures / f"{plan.name}_pareto.json", pareto))
        written.append(quality_figure(pareto, figures / f"{plan.name}_pareto.svg"))
    written += build_tables(plan, cells, main["dense"], figures)
    report = dynamics_results(plan, cells, main)
    if report["cells"]:
        written.append(write_json(figures / f"{plan.name}_dynamics.json", report))
    return written


def static_part(granularity: str) -> str:
    """The part or parts of a granularity, as static cells name them: ``attn_token+mlp_token`` → ``attn+mlp``."""
    return "+".join(name.split("_")[0] for name in granularity.split("+"))


def main_results(plan: Plan, cells: Cells) -> Json:
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


def _row(plan: Plan, cells: Cells, granularity: str, budget: float, recipe: str) -> Json:
    def over(read: Callable) -> Json | None:
        return cells.over_seeds("score", recipe, granularity, budget, read)

    row = {
        "granularity": granularity,
        "recipe": recipe,
        "budget": budget,
        "capacity": over(lambda cell: cell["conversations"]["total"]),
        "worst_capacity_error": _worst(plan, cells, recipe, granularity, budget),
        "capacity_prompt": over(optional("generation", "capacity", "prompt")),
        "capacity_generated": over(optional("generation", "capacity", "generated")),
        "capacity_by_task": {task: over(optional("generation", "capacity_by_task", task)) for task in plan.tasks},
        "exact_match": over(exact),
        "choices": over(optional("choices", "average")),
        "perplexity": over(optional("text", "perplexity")),
        "capacity_text": over(optional("text", "capacity")),
        "random": cells.over_seeds("random", None, granularity, budget, exact),
        "static": static_at(plan, cells, granularity, budget),
    }
    masks = cells("masks")
    if granularity == "attn_sequence" and masks is not None and row["exact_match"]:
        oracle = masks["oracle"][f"{budget:g}"]
        static = at_budget([entry["exact_match"] for entry in masks["static_fresh"]], budget)
        row["oracle"], row["static"] = oracle, static
        room = oracle - static
        row["whole_answer"] = over(optional("conversations", "whole_answer"))
        found = row["whole_answer"]
        row["recovered"] = round((found["mean"] - static) / room, 3) if found and room > 0 else None
    return row


def _worst(plan: Plan, cells: Cells, recipe: str, granularity: str, budget: float) -> float | None:
    found = [cells("score", recipe, granularity, seed, budget) for seed in plan.seeds]
    errors = [abs(cell["conversations"]["total"] - budget) for cell in found if cell is not None]
    return round(max(errors), 4) if errors else None


def static_at(plan: Plan, cells: Cells, granularity: str, budget: float) -> float | None:
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


def _published(cells: Cells, granularity: str, recipe: str, ours: list[str]) -> Json:
    row: Json = {"granularity": granularity, "recipe": recipe}
    for name, read in SCORES.items():
        row[name] = cells.over_seeds("score", recipe, granularity, OWN, read)
    for other in ours:
        row[f"{other}_at_its_capacity"] = cells.over_seeds("score", other, granularity, MATCH, exact)
    return row


def _others(plan: Plan, cells: Cells) -> list[Json]:
    rows: list[Json] = []
    for entry in plan.extra:
        name = (entry["recipe"], entry["granularity"], OWN)
        found = {key: cells.over_seeds("score", *name, read) for key, read in SCORES.items()}
        if found["exact_match"]:
            rows.append({**entry, **found})
    for part, method in plan.statics.items():
        cell = cells("static", method, part)
        for size, found in {} if cell is None else cell["sizes"].items():
            share = int(size) / cell["routers"]
            name = {"recipe": f"static, {method}", "granularity": part, "kept": found["kept"]}
            rows.append({**name, "capacity": share, "exact_match": found["exact_match"]["average"]})
    return rows


def dial_results(plan: Plan, cells: Cells) -> Json:
    """Requested against reached capacity, and quality, of one trained router per granularity."""
    dense, seed, series = cells("dense"), plan.seeds[0], {}
    ours = [name for name in plan.grid_recipes if plan.has_dial(name)]
    for granularity in plan.granularities:
        for recipe in ours:
            points = []
            for budget in sorted({*plan.dial, *plan.budgets}):
                cell = cells("score", recipe, granularity, seed, budget)
                if cell is not None:
                    reached = cell["conversations"]["total"]
                    points.append({"budget": budget, "capacity": reached, "exact_match": exact(cell)})
            series[granularity if len(ours) == 1 else f"{granularity}, {recipe}"] = points
    return {"seed": seed, "dense": None if dense is None else exact(dense), "series": series}


def pareto_results(plan: Plan, cells: Cells) -> Json:
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


def dynamics_results(plan: Plan, cells: Cells, main: Json) -> Json:
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
