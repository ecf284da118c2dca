"""The inputs of an experiment: rows to train on, rows to choose fixed masks on, items to score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from router_tuning.embedded.sample_files import read_heldout
from router_tuning.embedded.sample_tasks import Item, generate
from router_tuning.experiments.plan import Plan
from router_tuning.files import write_text
from router_tuning.tuning.arguments import ROOT

_SEARCH, _VALIDATION = 500_000, 700_000  # first seeds of rows that no run trains on
_HELD_OUT = ROOT / "data" / "sample" / "heldout"


def scored_items(plan: Plan, count: int) -> dict[str, list[Item]]:
    """The first ``count`` committed held-out items of every task, or as many to choose settings by."""
    return {task: _items(plan, task, count) for task in plan.tasks}


def scored_texts(plan: Plan) -> list[str]:
    """Bare texts for perplexity."""
    return [item.answer for item in _items(plan, plan.text_task, plan.texts)]


def _items(plan: Plan, task: str, count: int) -> list[Item]:
    if plan.scored == "validation":
        return [generate(task, _VALIDATION + number, "train") for number in range(count)]
    return read_heldout(_HELD_OUT / f"{task}.jsonl")[:count]


def train_file(plan: Plan, work: Path, recipe: str, seed: int) -> Path:
    """Training rows of a seed, other ones for every seed: ``train_per_task`` of every task.

    A recipe with its own ``sources`` draws as many rows in all from those tasks.
    """
    tasks = plan.sources.get(recipe, plan.tasks)
    label = f"_{recipe}" if recipe in plan.sources else ""
    path = work / f"train_{plan.train_per_task}{label}_seed{seed}.jsonl"
    if not path.exists():
        first, lines = 1_000_000 * (seed + 1), []
        for number in range(plan.train_per_task * len(plan.tasks) // len(tasks)):
            for task in tasks:
                item = generate(task, first + number, "train")
                lines.append(json.dumps({"dataset": task, "id": f"{task}_{number}", "messages": item.messages}))
        write_text(path, "\n".join(lines) + "\n")
    return path


def search_rows(plan: Plan) -> list[dict[str, Any]]:
    """Rows on which fixed masks are chosen: training split, never trained on."""
    numbers = range(_SEARCH, _SEARCH + plan.search_per_task)
    return [{"messages": generate(task, number, "train").messages} for number in numbers for task in plan.tasks]
