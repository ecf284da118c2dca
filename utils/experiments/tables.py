"""The main table of an experiment as Markdown."""

from __future__ import annotations

from typing import Any

from router_tuning.evaluation.tables import Table

Json = dict[str, Any]


def markdown(main: Json) -> str:
    """The main table, for reading."""
    several = len({row["recipe"] for row in main["rows"]}) > 1
    header = [
        *(["recipe"] if several else []),
        "granularity",
        "budget",
        "capacity",
        "of prompt",
        "of answer",
        "exact match",
        "choices",
        "ppl",
    ]
    header += ["random", "static", "oracle", "recovered"]
    rows = [
        [
            *([row["recipe"]] if several else []),
            row["granularity"],
            row["budget"],
            show(row["capacity"]),
            show(row["capacity_prompt"]) if row["capacity_generated"] else None,
            show(row["capacity_generated"]),
            show(row["exact_match"]),
            show(row["choices"]),
            show(row["perplexity"]),
            show(row["random"]),
            row["static"],
            row.get("oracle"),
            row.get("recovered"),
        ]
        for row in main["rows"]
    ]
    parts = [Table(header, rows).markdown()]
    if main["published"]:
        header = ["published recipe", "capacity", "exact match", "choices", "budget at its capacity"]
        rows = [
            [
                row["granularity"],
                show(row["capacity"]),
                show(row["exact_match"]),
                show(row["choices"]),
                show(next((v for k, v in row.items() if k.endswith("_at_its_capacity")), None)),
            ]
            for row in main["published"]
        ]
        parts.append(Table(header, rows).markdown())
    if main["others"]:
        rows = [
            [
                row["recipe"],
                row["granularity"],
                *(_either(row.get(key)) for key in ("capacity", "exact_match", "choices")),
            ]
            for row in main["others"]
        ]
        parts.append(Table(["control", "part", "capacity", "exact match", "choices"], rows).markdown())
    if main["rows"]:
        parts += ["Which inputs get depth: share executed by task, prompt and answer.", _by_task(main["rows"])]
    dense = main["dense"]
    first = "Nothing scored yet."
    if dense is not None:
        score = dense["exact_match"]["average"]
        first = (
            f"Dense: exact match {score:.3f}, choices {dense['choices']:.3f}, perplexity {dense['perplexity']:.2f}."
        )
    return "\n\n".join([first, *parts]) + "\n"


def _by_task(rows: list[Json]) -> str:
    lowest = min(row["budget"] for row in rows)
    tasks, alone = list(rows[0]["capacity_by_task"]), len({row["recipe"] for row in rows}) == 1
    found = []
    for row in (row for row in rows if row["budget"] == lowest):
        shares = [row["capacity_by_task"][task] for task in tasks]
        name = row["granularity"] if alone else f"{row['recipe']}, {row['granularity']}"
        found.append([name, row["budget"], *(None if s is None else f"{s['mean']:.2f}" for s in shares)])
    return Table(["granularity", "budget", *tasks], found).markdown()


def _either(value: Json | float | None) -> str | float | None:
    return show(value) if isinstance(value, dict) else value


def show(value: Json | None) -> str | None:
    """``mean ± sd`` of three decimals, the mean alone where there is one value."""
    if value is None:
        return None
    return f"{value['mean']:.3f}" + (f" ± {value['sd']:.3f}" if value["sd"] is not None else "")
