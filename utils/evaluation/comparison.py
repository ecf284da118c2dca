"""A run beside its controls at one share of the decoder's operations: a table, its legend, and a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from router_tuning.evaluation.records import KL, Group, Record, grouped, score_names
from router_tuning.evaluation.tables import Table

NAMES = {"dense": "dense model", "published": "published recipe"}
NAMES |= {"static": "modules removed for good", "random": "decisions at random"}
CLOSENESS = f"{KL}answers"
ORDER = ("dense", "routed", "published", "static", "random")


def comparison_table(records: Sequence[Record]) -> Table:
    """A row per policy: what is left of the operations, quality, and time and cache as shares of the dense model's."""
    rows = []
    for kind, group in _by_kind(records).items():
        row = {"": NAMES.get(kind) or f"routers, recipe {group.cell.get('recipe')}"}
        values = {"FLOPs": group.values("share")}
        values |= {name.removesuffix(", answers"): group.score(name) for name in (_main(records), CLOSENESS)}
        costs = {"time, prompts": ("prefill", "time_ratio"), "time, answers": ("generate", "time_ratio")}
        for name, keys in {**costs, "KV cache": ("kv_share",)}.items():
            values[name] = [1.0] if kind == "dense" else group.costs(*keys)
        rows.append(row | {name: statistics.fmean(found) for name, found in values.items() if found})
    return Table.of(rows)


def legend(records: Sequence[Record]) -> str:
    """What each column of :func:`comparison_table` is, with the numbers behind it."""
    score, ours = _main(records), _by_kind(records)["routed"].records[0]
    lines = ["FLOPs: share of the decoder's operations that is left; what stands in for skipped work is counted."]
    if score != CLOSENESS:
        documents = sum(task["samples"] for task in ours["tasks"].values())
        lines.append(f"{score}: mean over {len(ours['tasks'])} tasks, {documents} held-out items in all.")
    text = ours["texts"]["answers"]
    told = f"nats per token of {text['tokens']} in the answers of --prompts"
    lines.append(f"KL: divergence from the dense model's predictions, {told}.")
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
    groups, score = _by_kind(records), _main(records)
    value = {kind: f"{statistics.fmean(group.score(score)):.3f}" for kind, group in groups.items()}
    others = {"published": "the published recipe", "static": "removing modules for good", "random": "random decisions"}
    told = ", ".join(f"{text} {value[kind]}" for kind, text in others.items() if kind in value)
    share = statistics.fmean(groups["routed"].values("share"))
    kept = f"{score} {value['routed']} of the dense model's {value['dense']}"
    if score == CLOSENESS:
        kept = f"a KL of {value['routed']}"
    return f"With {share:.2f} of the operations the routers keep {kept}; at the same share: {told}."


def _by_kind(records: Sequence[Record]) -> dict[str, Group]:
    found = {}
    for group in grouped(records):
        policy = group.cell["policy"].split("_")[0]
        published = policy == "routed" and group.cell.get("recipe") == "paper" and "routed" in found
        found["published" if published else policy] = group
    return {kind: found[kind] for kind in ORDER if kind in found}


def _main(records: Sequence[Record]) -> str:
    """The first score that all policies have."""
    return next(name for name in score_names(records) if all(group.score(name) for group in grouped(records)))
