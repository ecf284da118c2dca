"""Tables of records: what each policy reaches, and how it differs from the others, paired document by document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.evaluation.tables import Cell, Table, with_error
from router_tuning.files import read_json_lines

Record = Mapping[str, Any]
COMPARISON = "evaluation/comparison.jsonl"
"""Where a run keeps the records of its comparison, below the run's folder."""
METRICS = {"exact_match": "exact match", "acc_norm": "choices", "acc": "choices", "word_perplexity": "word perplexity"}
"""What a table calls the metric that a task is judged by."""


def read_records(path: Path) -> list[Record]:
    """Records of a file, the last one of each cell; :class:`UserError` if it holds none."""
    found = {}
    for number, record in enumerate(read_json_lines(path), 1):
        if not isinstance(record, dict) or not isinstance(record.get("cell"), dict):
            raise UserError(f"{path}:{number}: no record of evaluate_mod.py, compare_run.py or experiments.py")
        found[cell_name(record["cell"])] = record
    if not found:
        raise UserError(f"{path}: no records there; evaluate_mod.py, compare_run.py and experiments.py write some")
    return list(found.values())


def cell_name(cell: Mapping[str, Any]) -> str:
    """What tells a cell from others, as one word."""
    parts = [cell["policy"], cell.get("recipe"), cell.get("granularity")]
    parts += [None if cell.get(key) is None else f"{key}{cell[key]:g}" for key in ("budget", "seed")]
    return "__".join(str(part) for part in parts if part is not None)


@dataclass(frozen=True)
class Group:
    """The records of one policy at one budget, one per seed."""

    records: Sequence[Record]

    @property
    def cell(self) -> Mapping[str, Any]:
        """Of the first seed."""
        return self.records[0]["cell"]

    @property
    def label(self) -> str:
        """The policy in words."""
        policy, recipe = self.cell["policy"].replace("_", " ", 1), self.cell.get("recipe")
        return (recipe or "routed") if policy == "routed" else policy if recipe is None else f"{policy}, {recipe}"

    def units(self, record: Record) -> dict[str, tuple[str, list[float]]]:
        """By task (all subjects of MMLU are one): the name of its metric, and its value on every document."""
        found: dict[str, tuple[str, list[float]]] = {}
        for name, task in record.get("tasks", {}).items():
            if task.get("metric") in METRICS:
                unit = "mmlu" if name.startswith("mmlu_") else name
                values = task.get("documents", [task["value"]])
                _, known = found.setdefault(unit, (METRICS[task["metric"]], []))
                known.extend(map(float, values))
        return found

    def averages(self, metric: str) -> list[float]:
        """Mean over the tasks that are judged by a metric, one per seed; seeds without such a task are left out."""
        found = []
        for record in self.records:
            means = [statistics.fmean(values) for name, values in self.units(record).values() if name == metric]
            found += [statistics.fmean(means)] if means else []
        return found

    def texts(self, name: str, key: str) -> list[Any]:
        """A value of ``compare_texts``, one per seed."""
        return [r["texts"][name][key] for r in self.records if key in r.get("texts", {}).get(name, {})]

    def costs(self, *keys: str) -> list[float]:
        """A value of ``measure_cost``, one per seed."""
        return [reduce(getitem, keys, record["cost"]) for record in self.records if "cost" in record]


def grouped(records: Sequence[Record]) -> list[Group]:
    """Records of the same policy and budget together, dense first, then by granularity and from large to small."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if "refused" not in record:
            key = tuple(cell.get(name) for name in ("policy", "recipe", "granularity", "budget"))
            groups.setdefault(key, []).append(record)
    places = {name: place for place, name in enumerate(dict.fromkeys(key[2] for key in groups))}
    return [
        Group(groups[key])
        for key in sorted(groups, key=lambda k: (k[0] != "dense", places[k[2]], -(k[3] or 0), k[0] != "routed", k[0]))
    ]


def all_tables(records: Sequence[Record]) -> list[Table]:
    """What there is to say of some records: policies and what they cost, differences, tasks."""
    found = [summary_table(records), difference_table(records), task_table(records)]
    return [table for table in found if table is not None]


def summary_table(records: Sequence[Record]) -> Table:
    """A row per policy and budget: operations left, mean scores (± deviation of seeds), closeness, times and cache.

    Times and bytes of keys and values are shares of the dense base's.
    """
    groups = grouped(records)
    columns: dict[str, list[Cell]] = {
        "policy": [group.label for group in groups],
        "granularity": [group.cell.get("granularity") for group in groups],
        "budget": [group.cell.get("budget") for group in groups],
        "FLOPs": [_mean([r["share"] for r in group.records if "share" in r]) for group in groups],
        "capacity": [_mean([r["capacity"] for r in group.records]) for group in groups],
    }
    for metric in dict.fromkeys(METRICS.values()):
        columns[metric] = [_mean(group.averages(metric)) for group in groups]
    for text in _text_names(records):
        columns[f"KL, {text}"] = [_mean(group.texts(text, "kl")) for group in groups]
        columns[f"ppl, {text}"] = [_mean(group.texts(text, "perplexity")) for group in groups]
    for phase in ("prefill", "generate"):
        columns[f"time, {phase}"] = [_mean(group.costs(phase, "time_ratio")) for group in groups]
    columns["KV bytes"] = [_mean(group.costs("kv_share")) for group in groups]
    return Table.of_columns(columns)


def control_table(records: Sequence[Record]) -> Table:
    """The first metric of each routed policy beside its controls: dense, random, every kind of static removal.

    Those at a budget for which no control was scored are left out.
    """
    groups = grouped(records)
    metric = next(m for m in dict.fromkeys(METRICS.values()) if any(group.averages(m) for group in groups))
    names = dict.fromkeys(g.cell["policy"] for g in groups if g.cell["policy"] not in ("dense", "routed"))
    rows: list[list[Cell]] = []
    for ours in (group for group in groups if group.cell["policy"] in ("routed", "dense")):
        found = {g.cell["policy"]: _mean(g.averages(metric)) for g in groups if _is_control(g.cell, ours.cell)}
        if ours.cell.get("budget") is None or set(names) & set(found):
            name = [ours.label, ours.cell.get("granularity"), ours.cell.get("budget")]
            spent = [_mean([r[key] for r in ours.records if key in r]) for key in ("share", "capacity")]
            rows.append([*name, *spent, _mean(ours.averages(metric)), *(found.get(name) for name in names)])
    titles = [name.replace("_", " ", 1) for name in names]
    return Table(["policy", "granularity", "budget", "FLOPs", "capacity", metric, *titles], rows)


def closeness_table(records: Sequence[Record]) -> Table:
    """A row per text, routed policy and budget: divergence from the dense model beside the controls' at equal FLOPs.

    ``FLOPs`` is what was left of the decoder's operations on that text, ``perplexity`` a multiple of the dense base's.
    """
    groups = grouped(records)
    names = dict.fromkeys(g.cell["policy"] for g in groups if g.cell["policy"] not in ("dense", "routed"))
    rows: list[list[Cell]] = []
    for text in _text_names(records):
        for ours in (group for group in groups if group.cell["policy"] == "routed" and group.texts(text, "kl")):
            found = {g.cell["policy"]: _mean(g.texts(text, "kl")) for g in groups if _is_control(g.cell, ours.cell)}
            pairs = zip(ours.texts(text, "perplexity"), ours.texts(text, "dense_perplexity"), strict=True)
            name = [text, ours.label, ours.cell.get("granularity"), ours.cell.get("budget")]
            closeness = [_mean(ours.texts(text, "share")), _mean(ours.texts(text, "kl"))]
            likeness = [_mean(ours.texts(text, "agreement")), _mean([a / b for a, b in pairs])]
            rows.append([*name, *closeness, *(found.get(name) for name in names), *likeness])
    controls = [name.replace("_", " ", 1) for name in names]
    header = ["text", "policy", "granularity", "asked", "FLOPs", "KL", *controls, "agreement", "perplexity"]
    return Table(header, rows)


def difference_table(records: Sequence[Record]) -> Table | None:
    """Each routed policy less each control, ± standard error of the mean over the same documents; None without any.

    Controls are those of the same run: random decisions at its rates, static removal at its operations.
    """
    groups = grouped(records)
    metrics = [m for m in dict.fromkeys(METRICS.values()) if any(group.averages(m) for group in groups)]
    texts, rows = _text_names(records), []
    for ours in (group for group in groups if group.cell["policy"] == "routed"):
        for other in groups:
            if not _is_control(other.cell, ours.cell):
                continue
            cells = [task_difference(ours, other, metric) for metric in metrics]
            cells += [text_difference(ours, other, text) for text in texts]
            if any(cells):
                name = [ours.label, ours.cell.get("granularity"), ours.cell.get("budget"), other.label]
                rows.append([*name, *(cell and with_error(*cell, digits=4) for cell in cells)])
    header = ["policy", "granularity", "budget", "less", *metrics, *(f"KL, {text}" for text in texts)]
    return Table(header, rows) if rows else None


def _is_control(cell: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    if cell["policy"] in ("dense", "routed"):
        return cell["policy"] == "dense"
    same = all(cell.get(name) == of.get(name) for name in ("granularity", "budget"))
    return same and cell.get("recipe") in (None, of.get("recipe"))


def task_difference(ours: Group, other: Group, metric: str) -> tuple[float, float] | None:
    """Mean over tasks of the mean difference over documents (of the means over seeds), and its standard error."""
    means, squares = [], []
    left, right = ([group.units(record) for record in group.records] for group in (ours, other))
    for name, (kind, values) in left[0].items():
        sides = [[units[name][1] for units in side if name in units] for side in (left, right)]
        if kind != metric or not all(sides) or len(values) < 2 or len({len(v) for side in sides for v in side}) > 1:
            continue
        seeds = [[statistics.fmean(column) for column in zip(*side, strict=True)] for side in sides]
        gaps = [a - b for a, b in zip(*seeds, strict=True)]
        means.append(statistics.fmean(gaps))
        squares.append(statistics.variance(gaps) / len(gaps))
    return (statistics.fmean(means), math.sqrt(sum(squares)) / len(means)) if means else None


def text_difference(ours: Group, other: Group, text: str) -> tuple[float, float] | None:
    """Difference of the mean divergence per token, and the standard error of this ratio of sums over documents."""
    sides = []
    for group in (ours, other):
        found = group.texts(text, "documents")
        if not found:
            return None
        tokens = found[0]["tokens"]
        sides.append([statistics.fmean(values) for values in zip(*(f["kl"] for f in found), strict=True)])
    if len(sides[0]) != len(sides[1]) or len(tokens) < 2:
        return None
    gaps = [a - b for a, b in zip(*sides, strict=True)]
    mean, count = sum(gaps) / sum(tokens), len(tokens)
    spread = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, tokens, strict=True))
    return mean, math.sqrt(spread * count / (count - 1)) / sum(tokens)


def task_table(records: Sequence[Record], errors: bool = True) -> Table:
    """A row per task, a column per record: the value of the metric that the task is judged by, ± standard error."""
    names = list(dict.fromkeys(name for record in records for name in record.get("tasks", {})))
    rows: list[list[Cell]] = []
    for name in names:
        found = [record.get("tasks", {}).get(name, {}) for record in records]
        metric = next((task["metric"] for task in found if "metric" in task), None)
        if metric is not None:
            cells = ["value" in t and with_error(t["value"], t.get("stderr") if errors else None) for t in found]
            rows.append([name, metric, *(cell or None for cell in cells)])
    shares = [record["share"] if record.get("tasks") else None for record in records]
    labels = [_column(record) for record in records]
    return Table(["task", "metric", *labels], [*rows, ["all", "share of FLOPs", *shares]])


def _column(record: Record) -> str:
    label, budget = Group([record]).label, record["cell"].get("budget")
    return label if budget is None else f"{label} {budget:.3g}"


def _text_names(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.get("texts", {})))


def _mean(values: Sequence[float]) -> Cell:
    if not values:
        return None
    return with_error(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
