"""Tables of README.md and docs/: each block between its markers is rendered from committed JSON alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from router_tuning.evaluation import records as tables
from router_tuning.evaluation.comparison import comparison_table
from router_tuning.evaluation.figures import GRANULARITY, front_figure
from router_tuning.evaluation.records import Record, cell_name, grouped, read_records
from router_tuning.evaluation.tables import Table
from router_tuning.files import read_json, read_json_lines
from router_tuning.places import ROOT
from router_tuning.speed.cells import measured
from router_tuning.speed.table import speed_tables

FIGURES = ROOT / "figures"
PICTURED = ("smollm2_budgets", "smollm2")
"""Experiments whose records the README's picture may show: the first that has been run."""
BASES = {
    "SmolLM2-135M-Instruct": ("smollm2_budgets", "smollm2"),
    "Qwen2.5-Coder-0.5B-Instruct": ("qwen",),
    "Gemma-3-270m": ("gemma", "gemma_tasks"),
}
"""Real bases, and the experiments on each."""


def records_block(make: Callable[[list[Record]], Table], path: str) -> str:
    """A table of an experiment's records, or of the quickstart's."""
    return make(read_records(FIGURES / f"{path}.jsonl")).markdown()


def speed_block(name: str) -> str:
    """A speed benchmark, if it has run: where and when, its tables, its command."""
    rows = read_json_lines(FIGURES / f"{name}.jsonl")
    if not rows:
        return "**Not measured yet**: no GPU was at hand."
    about = next(row["run"] for row in rows if "run" in row)
    failed = [f"{row['cell']}: {row['failed']}" for row in rows if "failed" in row]
    shown = [table.markdown() for table in speed_tables(measured(rows)).values()]
    return "\n\n".join([f"{about['device']}, {about['date'][:10]}:", *shown, *failed, f"`{about['command']}`"])


def bases_block() -> str:
    """Real bases, those that have been run."""
    files = {name: [FIGURES / "experiments" / f"{plan}.jsonl" for plan in plans] for name, plans in BASES.items()}
    found = {name: joined([read_records(file) for file in own if file.is_file()]) for name, own in files.items()}
    return bases_table((name, records) for name, records in found.items() if records).markdown()


def joined(experiments: Iterable[Sequence[Record]]) -> list[Record]:
    """Records of several experiments, one of each cell: with the tasks of all, and of a text what came first."""
    found: dict[str, dict[str, Any]] = {}
    for record in (record for records in experiments for record in records if "refused" not in record):
        known = found.setdefault(cell_name(record["cell"]), {"cell": record["cell"]})
        known |= {part: {**record.get(part, {}), **known.get(part, {})} for part in ("tasks", "texts")}
    return list(found.values())


def bases_table(bases: Iterable[tuple[str, Sequence[Record]]]) -> Table:
    """A row per base and budget: ours beside removal with the same skip path, and beside random decisions.

    Args:
        bases: name, and records of its experiment.
    """
    rows = []
    for name, records in bases:
        groups = grouped(records)
        [dense] = (group for group in groups if group.cell["policy"] == "dense")
        for ours in (g for g in groups if g.cell["policy"] == "routed" and g.cell.get("granularity") == GRANULARITY):
            if ours.cell.get("budget") is None:
                continue
            same = [g for g in groups if all(g.cell.get(k) == ours.cell.get(k) for k in ("granularity", "budget"))]
            found = {group.cell["policy"]: group for group in same}
            shown = {"ours": ours, "removed": found.get("static_low_rank"), "random": found.get("random")}
            row = {"base": name, "FLOPs, texts": ours.left("texts")}
            row |= {f"KL: {policy}": group and group.closeness() for policy, group in shown.items()}
            row |= {"FLOPs, tasks": (scored := ours.left("tasks"))}
            for policy, group in {"dense": dense, "ours": ours, "removed": shown["removed"]}.items():
                values = group.averages("choices") if group and scored else []
                row[f"tasks: {policy}"] = statistics.fmean(values) if values else None
            rows.append(row)
    return Table.of(rows)


def draw_front() -> Path:
    """The picture of the README."""
    files = [FIGURES / "experiments" / f"{plan}.jsonl" for plan in PICTURED]
    return front_figure(read_records(next(file for file in files if file.is_file())), FIGURES / "front.svg")


def kills_block() -> str:
    """How often a killed run ended as an undisturbed one, by engine."""
    found = read_json(FIGURES / "kill_and_resume.json")
    engines = ", ".join(sorted({record["engine"] for record in found["records"]}))
    row = [engines, found["processes"], found["kills"], found["same_bits_at_the_end"]]
    return Table(["engines", "processes", "SIGKILLs", "same bits at the end"], [row]).markdown()


def serving_block() -> str:
    """vLLM beside the engine and beside the dense base, by export."""
    rows = read_json_lines(FIGURES / "serving.jsonl")
    equal = [
        {
            "export": row["export"],
            "type": row["dtype"],
            "vLLM": row["setting"],
            "equal, in one batch": f"{row['equal_in_batch']} of {row['batch']}",
            "equal, alone": f"{row['equal_alone']} of {row['alone']}",
            "same tokens": f"{row['same_tokens']:.1%}",
            "preemptions": row["preemptions"],
            "tokens from the cache": row["prefix_hits"],
        }
        for row in rows
        if "setting" in row
    ]
    timed = [
        {
            "export": row["export"],
            "batch": row["batch"],
            "model": "dense" if row["budget"] is None else f"budget {row['budget']}",
            "tokens per second": row["tokens_per_second"],
            "ratio to dense": row["ratio"],
            "share of the FLOPs": row["flops_share"],
        }
        for row in rows
        if "ratio" in row
    ]
    return "\n\n".join(Table.of(found, digits=2).markdown() for found in (equal, timed) if found)


BLOCKS: dict[str, Callable[..., str]] = {
    "base": lambda: records_block(lambda records: tables.task_table(records, errors=False), "base"),
    "bases": bases_block,
    "comparison": lambda path: records_block(comparison_table, path),
    "controls": lambda path: records_block(tables.control_table, path),
    "summary": lambda path: records_block(tables.summary_table, path),
    "differences": lambda path: records_block(tables.difference_table, path),
    "speed": speed_block,
    "kills": kills_block,
    "serving": serving_block,
}
"""By the first word of a marker; the second is the argument."""


def render(text: str) -> str:
    """``text`` with every block between ``<!-- begin:NAME ARGUMENT -->`` and ``<!-- end -->`` rendered anew.

    Raises:
        ValueError: for a block that nothing renders, or a missing end marker.
    """

    def made(match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        if name not in BLOCKS:
            raise ValueError(f"nothing renders the block {name!r}; known: {', '.join(BLOCKS)}")
        if "<!-- begin:" in match[2]:
            raise ValueError(f"block {match[1]!r} has no end marker")
        return f"<!-- begin:{match[1]} -->\n{BLOCKS[name](*arguments)}\n<!-- end -->"

    return re.sub(r"<!-- begin:([^>]*?) -->\n(.*?)<!-- end -->", made, text, flags=re.DOTALL)
