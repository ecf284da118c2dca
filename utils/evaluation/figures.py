"""Quality against operations, drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from router_tuning.evaluation.records import Record, grouped, score_names
from router_tuning.files import publish

GRANULARITY = "attn_token+mlp_token"
"""What is pictured of real bases."""
LINES = {
    "routed": ("ours: a decision per token", "tab:blue", "o-"),
    "static_low_rank": ("modules removed, same skip path", "tab:orange", "s--"),
    "random": ("decisions at random, same skip path", "tab:grey", "x:"),
    "published": ("published recipe, at what it reaches", "tab:red", "D"),
}
"""By policy: label, colour and marker."""
_STYLES = {"routed": "o-", "static": "s--", "random": "x:"}


def quality_figure(records: Sequence[Record], path: Path) -> Path | None:
    """Mean score and divergence over the share of operations, a line per policy; None if nothing can be drawn."""
    groups, names = grouped(records), score_names(records)
    if not names:
        return None
    figure = Figure(figsize=(4.6 * len(names), 3.6), layout="constrained")
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for group in (group for group in groups if group.score(name)):
            key = (group.cell["policy"], group.label, group.cell.get("granularity") or "")
            spent = statistics.fmean(group.spent(name) or group.values("capacity"))
            lines.setdefault(key, []).append((spent, statistics.fmean(group.score(name))))
        for (policy, label, granularity), points in lines.items():
            if policy == "dense":
                axis.axhline(points[0][1], color="black", linestyle=":", label=label)
            else:
                axis.plot(*zip(*sorted(points), strict=True), _STYLES[policy.split("_")[0]], markersize=4, alpha=0.8,
                          label=f"{label}: {granularity}")  # fmt: skip
        axis.set(xlabel="share of the decoder's operations", ylabel=name)
    axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def front_figure(records: Sequence[Record], path: Path) -> Path:
    """Divergence over the share of the decoder's operations, a line per policy, the dense model at its end."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for group in grouped(records):
        policy = group.cell["policy"]
        if policy == "routed" and group.cell.get("recipe") == "paper":
            policy = "published"
        own = policy == "published" or (policy in LINES and group.cell.get("granularity") == GRANULARITY)
        if own and (value := group.closeness()) is not None:
            lines.setdefault(policy, []).append((group.left("texts"), value))
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


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure; a fixed salt and no date give the same bytes for the same numbers."""
    svg = path.suffix == ".svg"
    with publish(path) as draft, matplotlib.rc_context({"svg.hashsalt": "router-tuning"}):
        figure.savefig(draft, dpi=150, metadata={"Date": None} if svg else None)
    return path
