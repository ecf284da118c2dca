"""Tables built from a comparison's JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from router_tuning.evaluation.harness import main_score
from router_tuning.evaluation.tables import Cell, Table, with_error

LOWER_IS_BETTER = ("word_perplexity", "bits_per_byte")


def score_table(comparison: Mapping[str, Any], errors: bool = True) -> Table:
    """One row per task, then per group: the headline metric of every system, and the tuned capacity on that task."""
    systems = comparison["systems"]
    scores = {system["name"]: system["evaluation"]["scores"] for system in systems}
    groups = systems[0]["evaluation"]["groups"]
    meter = next(s["evaluation"]["meter"] for s in systems if s["name"] == "tuned")
    rows: list[list[Cell]] = []
    first = scores[systems[0]["name"]]
    for name in [*(n for n in first if n not in groups), *(n for n in first if n in groups)]:
        if (found := main_score(first[name])) is None:
            continue
        metric = found[0]
        cells = [_cell(scores[system["name"]][name], errors) for system in systems]
        capacity = meter.get(name, {}).get("capacity", {}).get("total")
        label = f"{name} (mean)" if name in groups else name
        rows.append([label, metric + (" ↓" if metric in LOWER_IS_BETTER else ""), *cells, capacity])
    header = ["task", "metric", *(system["name"] for system in systems), "tuned capacity"]
    return Table(header, rows)


def cost_table(comparison: Mapping[str, Any]) -> Table:
    """Capacity, FLOPs, seconds and cache of the tuned model beside the dense base."""
    cost = comparison["cost"]
    rows: list[list[Cell]] = [
        ["capacity (share of routed modules run)", 1.0, cost["capacity"]["total"], cost["capacity"]["total"]],
        [
            "GFLOPs, forward over the prompts",
            cost["flops_dense"] / 1e9,
            cost["flops_routed"] / 1e9,
            cost["flops_share"],
        ],
        ["seconds, prompts", *_times(cost["prefill"])],
        [f"seconds, prompts + {cost['new_tokens']} new tokens", *_times(cost["generate"])],
        [
            "KV cache after the prompts, KB",
            cost["kv_bytes_dense"] / 1e3,
            cost["kv_bytes_routed"] / 1e3,
            cost["kv_share"],
        ],
    ]
    return Table(["cost", "dense", "tuned", "tuned / dense"], rows)


def files_table(files: Sequence[Mapping[str, Any]]) -> Table:
    """One row per task or group that any of the results files has, one column of scores and of capacity per file."""
    names = list(dict.fromkeys(name for file in files for name in file["scores"]))
    rows: list[list[Cell]] = []
    for name in names:
        found = [main_score(file["scores"].get(name, {})) for file in files]
        metrics = [best[0] for best in found if best]
        if not metrics:
            continue
        capacities = [file["meter"].get(name, {}).get("capacity", {}).get("total") for file in files]
        rows.append([name, metrics[0], *[best and with_error(best[1], best[2]) for best in found], *capacities])
    seconds = [sum(entry["seconds"] for entry in file["meter"].values()) for file in files]
    rows.append(["all tasks", "seconds", *(f"{value:.1f}" for value in seconds), *[None] * len(files)])
    titles = [file["name"] for file in files]
    return Table(["task", "metric", *titles, *(f"capacity, {title}" for title in titles)], rows)


def headline(comparison: Mapping[str, Any]) -> list[dict[str, float | str]]:
    """``{"name", "capacity", "flops_share", "score"}`` per system; the score is the mean of its 0-to-1 metrics.

    Free-running exact match is averaged where there is any, else accuracy.
    """
    found = []
    for system in comparison["systems"]:
        scores, groups = system["evaluation"]["scores"], system["evaluation"]["groups"]
        best = [best for name, task in scores.items() if name not in groups and (best := main_score(task))]
        kinds = [metric for metric, _, _ in best]
        chosen = "exact_match" if "exact_match" in kinds else "acc_norm" if "acc_norm" in kinds else "acc"
        values = [value for metric, value, _ in best if metric == chosen]
        entry = {key: system[key] for key in ("name", "capacity", "flops_share")}
        found.append(entry | {"score": sum(values) / len(values) if values else float("nan"), "metric": chosen})
    return found


def _cell(scores: Mapping[str, float], errors: bool) -> Cell:
    found = main_score(scores)
    return None if found is None else with_error(found[1], found[2] if errors else None)


def _times(times: Mapping[str, float]) -> list[Cell]:
    return [times["seconds_dense"], times["seconds_routed"], times["time_ratio"]]
