"""A run beside its controls at one share of the decoder's operations: a table, its legend, and a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from router_tuning.evaluation.records import METRICS, Group, Record, grouped
from router_tuning.evaluation.tables import Table

NAMES = {"dense": "dense model", "published": "published recipe"}
NAMES |= {"static": "modules removed for good", "random": "decisions at random"}
ORDER = ("dense", "routed", "published", "static", "random")


def comparison_table(records: Sequence[Record]) -> Table:
    """A row per policy: what is left of the operations, quality, and time and cache as shares of the dense model's."""
    metric, rows = _metric(records), []
    for kind, group in _by_kind(records).items():
        row = {"": NAMES.get(kind) or f"routers, recipe {group.cell.get('recipe')}", "FLOPs": group.values("share")}
        row |= {metric or "score": group.averages(metric) if metric else [], "KL": group.texts("answers", "kl")}
        costs = {"time, prompts": ("prefill", "time_ratio"), "time, answers": ("generate", "time_ratio")}
        for name, keys in {**costs, "KV cache": ("kv_share",)}.items():
            row[name] = [1.0] if kind == "dense" else group.costs(*keys)
        rows.append({name: statistics.fmean(v) if isinstance(v, list) and v else v or None for name, v in row.items()})
    return Table.of(rows)


def legend(records: Sequence[Record]) -> str:
    """What each column of :func:`comparison_table` is, with the numbers behind it."""
    metric, ours = _metric(records), _by_kind(records)["routed"].records[0]
    lines = ["FLOPs: share of the decoder's operations that is left; what stands in for skipped work is counted."]
    if metric:
        documents = sum(task["samples"] for task in ours["tasks"].values())
        lines.append(f"{metric}: mean over {len(ours['tasks'])} tasks, {documents} held-out items in all.")
    text = ours["texts"]["answers"]
    lines.append(
        f"KL: divergence from the dense model's predictions, nats per token of {text['tokens']} in held-out answers."
    )
    if cost := ours.get("cost"):
        prompts, answers = (cost[phase]["seconds_dense"] for phase in ("prefill", "generate"))
        lines.append(
            f"time: over the dense model's, {prompts:.2f} s for {cost['prompts']} prompts and {answers:.2f} s with "
            f"{cost['new_tokens']} new tokens each, medians of {cost['repeats']} rounds in turns."
        )
        lines.append("KV cache: bytes of keys and values after the prompts, over the dense model's.")
    return "\n".join(lines)


def reading(records: Sequence[Record]) -> str:
    """The table in a sentence."""
    groups, metric = _by_kind(records), _metric(records)
    value = {}
    for kind, group in groups.items():
        found = group.averages(metric) if metric else group.texts("answers", "kl")
        value[kind] = f"{statistics.fmean(found):.3f}"
    others = {"published": "the published recipe", "static": "removing modules for good", "random": "random decisions"}
    told = [f"{text} {value[kind]}" for kind, text in others.items() if kind in value]
    share = statistics.fmean(record["share"] for record in groups["routed"].records)
    dense = (
        f"{metric} {value['routed']} of the dense model's {value['dense']}" if metric else f"a KL of {value['routed']}"
    )
    return f"With {share:.2f} of the operations the routers keep {dense}; at the same share: {', '.join(told)}."


def _by_kind(records: Sequence[Record]) -> dict[str, Group]:
    found = {}
    for group in grouped(records):
        policy = group.cell["policy"].split("_")[0]
        published = policy == "routed" and group.cell.get("recipe") == "paper" and "routed" in found
        found["published" if published else policy] = group
    return {kind: found[kind] for kind in ORDER if kind in found}


def _metric(records: Sequence[Record]) -> str | None:
    groups = grouped(records)
    names = dict.fromkeys(METRICS.values())
    return next((name for name in names if all(group.averages(name) for group in groups)), None)
