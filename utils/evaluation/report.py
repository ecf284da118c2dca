"""``report.md`` of a run, written from the comparison's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router_tuning.evaluation.results import cost_table, headline, score_table
from router_tuning.evaluation.tables import Table

COMPARISON = "evaluation/comparison.json"
"""Where a run keeps its comparison, below the run's folder."""


def measured(comparison: Mapping[str, Any]) -> str:
    """Markdown of what was measured: summary, scores, cost, static masks, and where the numbers come from."""
    return "\n\n".join(
        [
            summary_table(comparison).markdown(),
            "### Score per task",
            score_table(comparison).markdown(),
            "### Cost",
            cost_table(comparison).markdown(),
            *_static(comparison),
            _origin(comparison),
        ]
    )


def report(comparison: Mapping[str, Any], run: Mapping[str, Any], figures: Sequence[str], name: str) -> str:
    """The whole report; ``figures`` are file names beside it, ``run`` the content of ``run.json``."""
    arguments = run.get("arguments", {})
    knobs = [f"`{key}` {arguments[key]}" for key in ("recipe", "target_capacity", "gradient_scale", "learning_rate")
             if arguments.get(key) is not None]  # fmt: skip
    parts = [f"# {name}", ", ".join(knobs), "## Measured", measured(comparison)]
    parts += ["## Figures", *(f"![{file}]({file})" for file in figures)] if figures else []
    return "\n\n".join(part for part in parts if part) + "\n"


def summary_table(comparison: Mapping[str, Any]) -> Table:
    """One row per system: capacity, share of FLOPs, average score."""
    systems = headline(comparison)
    rows = [[s["name"], s["capacity"], s["flops_share"], s["score"]] for s in systems]
    return Table(["system", "capacity", "share of FLOPs", f"average {systems[0]['metric']}"], rows)


def _static(comparison: Mapping[str, Any]) -> list[str]:
    masks = [system for system in comparison["systems"] if "kept" in system]
    if not masks:
        return []
    lines = [
        f"- {m['name']}: keeps layers {', '.join(map(str, m['kept'])) or 'none'} for every input; "
        f"{m['search_method']} search, loss {m['search_loss']:.3f} on the search rows"
        for m in masks
    ]
    return [
        "Static masks are searched on training rows and scored on the same held-out rows as the others.",
        "\n".join(lines),
    ]


def _origin(comparison: Mapping[str, Any]) -> str:
    tuned = next(system for system in comparison["systems"] if system["name"] == "tuned")["evaluation"]
    origin, routing, plan = tuned["provenance"], tuned["model"]["routing"], comparison["plan"]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    limit = f"{plan['limit']} documents per task" if plan["limit"] else "all documents of each task"
    cost, pooling = comparison["cost"], routing["mod_router_pooling"]
    future = " (the score of a sequence sees its answer)" if pooling == "sequence" else ""
    return (
        f"Log-likelihoods use `router_pooling: {pooling}`{future}; {limit}. Capacity, FLOPs and cache: "
        f"{cost['prompts']} held-out prompts. Seconds: medians of {cost['repeats']} rounds in which both models take "
        f"turns in one process, on {origin['device']}. {origin['date']}, commit {origin['git_commit']}, {versions}."
    )
