"""Tables of records: what each policy reaches, and how it differs from the others, paired document by document."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.evaluation.tables import Cell, Table, with_deviation, with_error
from router_tuning.files import read_json_lines

Record = Mapping[str, Any]
COMPARISON = "evaluation/comparison.jsonl"
"""Where a run keeps the records of its comparison, below the run's folder."""
KL = "KL, "
"""Before the name of a text: divergence from the dense base there."""
METRICS = {"exact_match": "exact match", "acc_norm": "choices", "acc": "choices", "word_perplexity": "word perplexity"}
"""What a table calls the metric that a task is judged by."""


def read_records(*paths: Path) -> list[Record]:
    """Records of files, the last one that a file holds of each cell; where files share a cell, cells name their file.

    Raises:
        UserError: for a file that holds none, or something else.
    """
    found: dict[tuple[Path, str], Record] = {}
    for path in dict.fromkeys(paths):
        for number, record in enumerate(read_json_lines(path), 1):
            if not isinstance(record, dict) or not isinstance(record.get("cell"), dict):
                raise UserError(f"{path}:{number}: no record of evaluate_mod.py, compare_run.py or experiments.py")
            found[path, cell_name(record["cell"])] = record
        if path not in {file for file, _ in found}:
            raise UserError(f"{path}: no records there; evaluate_mod.py, compare_run.py and experiments.py write some")
    if len({name for _, name in found}) == len(found):
        return list(found.values())
    return [record | {"cell": record["cell"] | {"file": str(path)}} for (path, _), record in found.items()]


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
        told = (recipe or "routed") if policy == "routed" else policy if recipe is None else f"{policy}, {recipe}"
        return f"{told}, {self.cell['file']}" if "file" in self.cell else told

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

    def values(self, key: str) -> list[float]:
        """A value of the records themselves, one per seed."""
        return [record[key] for record in self.records if key in record]

    def mean(self, key: str) -> Cell:
        """Its mean, and deviation."""
        return with_deviation(self.values(key))

    def averages(self, metric: str) -> list[float]:
        """Mean over the tasks that are judged by a metric, one per seed; seeds without such a task are left out."""
        found = []
        for record in self.records:
            means = [statistics.fmean(values) for name, values in self.units(record).values() if name == metric]
            found += [statistics.fmean(means)] if means else []
        return found

    def score(self, name: str) -> list[float]:
        """One of :func:`score_names`, one value per seed."""
        text = name.removeprefix(KL)
        return self.averages(name) if text == name else self.texts(text, "kl")

    def spent(self, name: str) -> list[float]:
        """Share of the decoder's operations that was left where that was scored."""
        text = name.removeprefix(KL)
        return self.values("share") if text == name else self.texts(text, "share")

    def closeness(self) -> float | None:
        """Divergence from the dense model in nats per token, mean over texts and seeds."""
        found = [statistics.fmean(self.texts(name, "kl")) for name in text_names(self.records)]
        return statistics.fmean(found) if found else None

    def left(self, of: str) -> float | None:
        """Share of the decoder's operations that was left, mean over the ``texts`` or ``tasks`` and over seeds."""
        parts = [part for record in self.records for part in record.get(of, {}).values()]
        return statistics.fmean(part.get("share", 1.0) for part in parts) if parts else None

    def texts(self, name: str, key: str) -> list[Any]:
        """A value of ``compare_texts``, one per seed."""
        return [r["texts"][name][key] for r in self.records if key in r.get("texts", {}).get(name, {})]

    def costs(self, *keys: str) -> list[float]:
        """A value of ``measure_cost``, one per seed; seeds without it are left out."""
        found = [reduce(lambda part, key: part.get(key, {}), keys, record.get("cost", {})) for record in self.records]
        return [value for value in found if value != {}]


def grouped(records: Sequence[Record]) -> list[Group]:
    """Records of the same policy and budget together, dense first, then by granularity and from large to small."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        cell = record["cell"]
        if "refused" not in record:
            key = tuple(cell.get(name) for name in ("policy", "recipe", "granularity", "budget", "file"))
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
    rows = []
    for group in grouped(records):
        row = {
            "policy": group.label,
            **_place(group),
            "FLOPs": group.mean("share"),
            "capacity": group.mean("capacity"),
        }
        row |= {name: with_deviation(group.score(name)) for name in score_names(records)}
        row |= {f"ppl, {text}": with_deviation(group.texts(text, "perplexity")) for text in text_names(records)}
        for phase in ("prefill", "generate"):
            row[f"FLOPs, {phase}"] = with_deviation(group.costs(phase, "share"))
            row[f"time, {phase}"] = with_deviation(group.costs(phase, "time_ratio"))
        rows.append({**row, "KV bytes": with_deviation(group.costs("kv_share"))})
    return Table.of(rows)


def control_table(records: Sequence[Record]) -> Table:
    """A row per score, routed policy and budget: the policy beside its controls.

    Scores are the mean over the tasks of the first metric, beside the dense base's; then on each text the divergence
    from the dense base. ``FLOPs`` is what was left of the decoder's operations there, ``perplexity`` a multiple of the
    dense base's. Budgets for which no control was scored are left out.
    """
    groups, rows = grouped(records), []
    controls = [name for name in dict.fromkeys(g.cell["policy"] for g in groups) if name != "routed"]
    tasks = [name for name in score_names(records) if not name.startswith(KL)]
    for score in (name for name in score_names(records) if name not in tasks[1:]):
        text = score.removeprefix(KL)
        for ours in (group for group in groups if group.cell["policy"] == "routed" and group.score(score)):
            beside = {group.cell["policy"]: group for group in groups if _is_control(group.cell, ours.cell)}
            if len(beside) < 2 and ours.cell.get("budget") is not None:
                continue
            row = {"score": score, "policy": ours.label, **_place(ours), "FLOPs": with_deviation(ours.spent(score))}
            row |= {"capacity": ours.mean("capacity") if score in tasks else None}
            row |= {"ours": with_deviation(ours.score(score))}
            for name in (name for name in controls if name != "dense" or score in tasks):
                row[name.replace("_", " ", 1)] = with_deviation(beside[name].score(score)) if name in beside else None
            pairs = zip(ours.texts(text, "perplexity"), ours.texts(text, "dense_perplexity"), strict=True)
            row |= {"agreement": with_deviation(ours.texts(text, "agreement"))}
            rows.append({**row, "perplexity": with_deviation([mine / its for mine, its in pairs])})
    return Table.of(rows)


def difference_table(records: Sequence[Record]) -> Table | None:
    """Each routed policy less each control, ± standard error of the mean over the same documents; None without any.

    Controls are those of the same run: random decisions at its rates, static removal at its operations.
    """
    groups, rows = grouped(records), []
    for ours in (group for group in groups if group.cell["policy"] == "routed"):
        for other in (group for group in groups if _is_control(group.cell, ours.cell)):
            found = {name: difference(ours, other, name) for name in score_names(records)}
            if any(found.values()):
                told = {name: gap and with_error(*gap, digits=4) for name, gap in found.items()}
                rows.append({"policy": ours.label, **_place(ours), "less": other.label, **told})
    return Table.of(rows) if rows else None


def _place(group: Group) -> dict[str, Cell]:
    return {name: group.cell.get(name) for name in ("granularity", "budget")}


def _is_control(cell: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    if cell["policy"] in ("dense", "routed"):
        return cell["policy"] == "dense"
    same = all(cell.get(name) == of.get(name) for name in ("granularity", "budget", "file"))
    return same and cell.get("recipe") in (None, of.get("recipe"))


def difference(ours: Group, other: Group, score: str) -> tuple[float, float] | None:
    """Mean difference of a score (of the means over seeds) and its standard error, paired by document.

    Of tasks, the mean over them; of a text, that of the divergence per token: a ratio of sums over documents.
    """
    if (text := score.removeprefix(KL)) != score:
        found = [group.texts(text, "documents") for group in (ours, other)]
        if not all(found) or len(found[0][0]["tokens"]) < 2 or len({len(d["kl"]) for side in found for d in side}) > 1:
            return None
        return _paired(*([document["kl"] for document in side] for side in found), found[0][0]["tokens"])
    gaps = []
    left, right = ([group.units(record) for record in group.records] for group in (ours, other))
    for name, (kind, values) in left[0].items():
        sides = [[units[name][1] for units in side if name in units] for side in (left, right)]
        if kind == score and all(sides) and len(values) > 1 and len({len(v) for side in sides for v in side}) == 1:
            gaps.append(_paired(*sides, [1] * len(values)))
    if not gaps:
        return None
    means, errors = zip(*gaps, strict=True)
    return statistics.fmean(means), math.hypot(*errors) / len(means)


def _paired(ours: Sequence[Sequence[float]], other: Sequence[Sequence[float]], sizes: Sequence[float]) -> tuple:
    """Difference of sums over documents per unit of size, and its standard error; sides hold values per seed."""
    sides = [[statistics.fmean(column) for column in zip(*side, strict=True)] for side in (ours, other)]
    gaps, count = [a - b for a, b in zip(*sides, strict=True)], len(sizes)
    mean = sum(gaps) / sum(sizes)
    spread = sum((gap - mean * size) ** 2 for gap, size in zip(gaps, sizes, strict=True))
    return mean, math.sqrt(spread * count / (count - 1)) / sum(sizes)


def task_table(records: Sequence[Record], errors: bool = True) -> Table | None:
    """A row per task, a column per record: the value of the metric that the task is judged by, ± standard error.

    None where no record was scored on tasks.
    """
    rows: list[dict[str, Cell]] = []
    columns = _columns(records)
    for name in dict.fromkeys(name for record in records for name in record.get("tasks", {})):
        found = {label: record.get("tasks", {}).get(name, {}) for label, record in columns.items()}
        metric = next((task["metric"] for task in found.values() if "metric" in task), None)
        if metric is not None:
            told = {label: with_error(t["value"], t.get("stderr") if errors else None) for label, t in found.items()
                    if "value" in t}  # fmt: skip
            rows.append({"task": name, "metric": metric, **told})
    shares = {label: record["share"] for label, record in columns.items() if record.get("tasks")}
    return Table.of([*rows, {"task": "all", "metric": "share of FLOPs", **shares}]) if shares else None


def _columns(records: Sequence[Record]) -> dict[str, Record]:
    """Records by policy and budget and, where these don't tell them apart, by granularity and seed, too."""
    for names in (("budget",), ("granularity", "budget", "seed")):
        found = {}
        for record in records:
            told = [record["cell"].get(name) for name in names]
            told = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in told if value is not None]
            found[" ".join([Group([record]).label, *told])] = record
        if len(found) == len(records):
            break
    return found


def text_names(records: Sequence[Record]) -> list[str]:
    """Texts that were scored."""
    return list(dict.fromkeys(name for record in records for name in record.get("texts", {})))


def score_names(records: Sequence[Record]) -> list[str]:
    """What there is a score of, as columns name it: metrics of tasks, and :data:`KL` on each text."""
    groups = grouped(records)
    metrics = [name for name in dict.fromkeys(METRICS.values()) if any(group.averages(name) for group in groups)]
    return metrics + [f"{KL}{text}" for text in text_names(records)]
