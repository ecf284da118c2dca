"""Tables of an experiment beside the main one: routers with and without LoRA, and tokens by expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from router_tuning.evaluation.tables import Table
from router_tuning.experiments.cells import Cells, Json, exact, optional
from router_tuning.experiments.plan import MATCH, OWN, Plan
from router_tuning.experiments.tables import show
from router_tuning.files import write_json, write_text

SCORES: dict[str, Callable[[Json], float | None]] = {
    "capacity": lambda cell: cell["conversations"]["total"],
    "exact_match": exact,
    "choices": optional("choices", "average"),
    "perplexity": optional("text", "perplexity"),
}
"""What a score cell says, by column."""


def build_tables(plan: Plan, cells: Cells, dense: Json | None, figures: Path) -> list[Path]:
    """Write ``lora_rt`` and ``expert_rt`` where the experiment has such cells; returns the files."""
    written = []
    if rows := lora_rows(plan, cells):
        written.append(write_json(figures / f"{plan.name}_lora_rt.json", {"dense": dense, "rows": rows}))
        written.append(write_text(figures / f"{plan.name}_lora_rt.md", _scores_table(rows, dense)))
    if found := expert_rows(plan, cells):
        written.append(write_json(figures / f"{plan.name}_expert_rt.json", {"dense": dense, "budgets": found}))
        written.append(write_text(figures / f"{plan.name}_expert_rt.md", experts_markdown(found, dense)))
    return written


def trained(flags: Json) -> str:
    """What a recipe's flags train."""
    if str(flags.get("router_only", True)).lower() == "false":
        return "all weights and routers"
    if not flags.get("lora"):
        return "routers"
    return "LoRA" if flags.get("threshold") == 0 else "LoRA and routers"


def lora_rows(plan: Plan, cells: Cells) -> list[Json]:
    """Controls that train more than routers, and the published recipe and ours on the same part beside them."""
    rows: list[Json] = []
    for granularity in dict.fromkeys(entry["granularity"] for entry in plan.extra):
        names = [entry["recipe"] for entry in plan.extra if entry["granularity"] == granularity]
        for recipe in [*names, *plan.grid_recipes]:
            capacity = MATCH if plan.has_dial(recipe) else OWN
            scores = {k: cells.over_seeds("score", recipe, granularity, capacity, read) for k, read in SCORES.items()}
            if scores["exact_match"]:
                seeds = scores["exact_match"]["n"]
                # A mean over fewer seeds than its neighbours' would be compared with them.
                scores = {key: value if value and value["n"] == seeds else None for key, value in scores.items()}
                name = {"trained": trained(plan.recipes[recipe]), "recipe": recipe, "granularity": granularity}
                rows.append({**name, **scores})
    return rows


def _scores_table(rows: list[Json], dense: Json | None) -> str:
    header = ["trained", "recipe", "part", *SCORES]
    lines: list[list[str | float | None]] = []
    if dense is not None:
        average = dense["exact_match"]["average"]
        lines.append(["nothing", "dense", None, 1.0, average, dense["choices"], dense["perplexity"]])
    lines += [[row["trained"], row["recipe"], row["granularity"], *(show(row[key]) for key in SCORES)] for row in rows]
    return Table(header, lines).markdown() + "\n"


def expert_rows(plan: Plan, cells: Cells) -> list[Json]:
    """Tokens assigned to and executed by every expert by budget, first seed; scores of all seeds."""
    rows: list[Json] = []
    for granularity in (name for name in plan.granularities if name.startswith("expert")):
        for recipe in plan.grid_recipes:
            for budget in plan.budgets if plan.has_dial(recipe) else [OWN]:
                cell = cells("score", recipe, granularity, plan.seeds[0], budget)
                if cell is None:
                    continue
                scores = {
                    k: cells.over_seeds("score", recipe, granularity, budget, read) for k, read in SCORES.items()
                }
                name = {"recipe": recipe, "budget": budget, "seed": plan.seeds[0]}
                rows.append({**name, **scores, "experts": cell["conversations"]["experts"]})
    return rows


def experts_markdown(rows: list[Json], dense: Json | None) -> str:
    """Per recipe and budget: share executed of the tokens assigned, by layer and expert."""
    score = "" if dense is None else f" Dense: exact match {dense['exact_match']['average']:.3f}."
    parts = [f"Tokens executed of tokens assigned, held-out conversations, seed {rows[0]['seed']}.{score}"]
    for row in rows:
        count = max(len(found["assigned"]) for found in row["experts"].values())
        lines: list[list[str | None]] = []
        for layer, found in row["experts"].items():
            pairs = zip(found["executed"], found["assigned"], strict=True)
            cells = [f"{ran:,} of {given:,} ({ran / max(given, 1):.2f})" for ran, given in pairs]
            lines.append([layer, *cells, *[None] * (count - len(cells))])
        budget = "its own capacity" if row["budget"] == OWN else f"budget {row['budget']:g}"
        reached = f"capacity {show(row['capacity'])}, exact match {show(row['exact_match'])}"
        parts.append(f"**{row['recipe']}, {budget}**: {reached}.")
        parts.append(Table(["layer", *(f"expert {number}" for number in range(count))], lines).markdown())
    return "\n\n".join(parts) + "\n"
