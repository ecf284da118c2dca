"""What the README shows first: a picture of one real base, a table of several, from records of their experiments."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from router_tuning.evaluation.figures import save_figure
from router_tuning.evaluation.records import Group, Record, grouped, text_names
from router_tuning.evaluation.tables import Table

GRANULARITY = "attn_token+mlp_token"
LINES = {
    "routed": ("ours: a decision per token", "tab:blue", "o-"),
    "static_low_rank": ("modules removed, same skip path", "tab:orange", "s--"),
    "random": ("decisions at random, same skip path", "tab:grey", "x:"),
    "published": ("published recipe, at what it reaches", "tab:red", "D"),
}
"""By policy: label, colour and marker."""


def divergence(group: Group) -> float | None:
    """Mean over kinds of text of the divergence from the dense model, nats per token; mean over seeds."""
    found = [statistics.fmean(group.texts(name, "kl")) for name in text_names(group.records)]
    return statistics.fmean(found) if found else None


def front_figure(records: Sequence[Record], path: Path) -> Path:
    """Divergence over the share of the decoder's operations, a line per policy, the dense model at its end."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for group in grouped(records):
        policy = "published" if _published(group) else group.cell["policy"]
        own = policy == "published" or (policy in LINES and group.cell.get("granularity") == GRANULARITY)
        if own and (value := divergence(group)) is not None:
            lines.setdefault(policy, []).append((share_left(group, "texts"), value))
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for policy, (label, colour, style) in LINES.items():
        if policy in lines:
            axes.plot(*zip(*sorted(lines[policy]), strict=True), style, color=colour, label=label, markersize=5)
    axes.plot([1.0], [0.0], "k*", markersize=11, label="dense model", clip_on=False)
    axes.set_yscale("symlog", linthresh=0.05)
    ticks = [0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    top = max(value for points in lines.values() for _, value in points)
    axes.set_yticks([tick for tick in ticks if tick <= 2 * top], [f"{tick:g}" for tick in ticks if tick <= 2 * top])
    axes.minorticks_off()
    axes.set(xlabel="share of the decoder's operations that is left", ylabel="divergence from dense, nats per token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    return save_figure(figure, path)


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
            row = {"base": name, "FLOPs, texts": share_left(ours, "texts")}
            row |= {f"KL: {policy}": group and divergence(group) for policy, group in shown.items()}
            row |= {"FLOPs, tasks": (scored := share_left(ours, "tasks"))}
            for policy, group in {"dense": dense, "ours": ours, "removed": shown["removed"]}.items():
                values = group.averages("choices") if group and scored else []
                row[f"tasks: {policy}"] = statistics.fmean(values) if values else None
            rows.append(row)
    return Table.of(rows)


def _published(group: Group) -> bool:
    return group.cell["policy"] == "routed" and group.cell.get("recipe") == "paper"


def share_left(group: Group, of: str) -> float | None:
    """Share of the decoder's operations that was left, mean over the ``texts`` or ``tasks`` scored and over seeds."""
    parts = [part for record in group.records for part in record.get(of, {}).values()]
    return statistics.fmean(part.get("share", 1.0) for part in parts) if parts else None
