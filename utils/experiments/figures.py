"""The figures of an experiment: what the dial reaches, and quality against time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

_MARKS = "osD^vP*"


def dial_figure(dial: dict[str, Any], path: Path) -> Path:
    """Capacity error in points and exact match over the requested budget, one line per granularity."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for mark, (granularity, points) in zip(_MARKS, dial["series"].items(), strict=False):
        budgets = [p["budget"] for p in points]
        left.plot(budgets, [100 * (p["capacity"] - p["budget"]) for p in points], marker=mark, label=granularity)
        right.plot([p["capacity"] for p in points], [p["exact_match"] for p in points], marker=mark, label=granularity)
    left.axhspan(-2, 2, color="grey", alpha=0.15)
    left.set(xlabel="requested budget", ylabel="reached - requested (points)")
    if dial["dense"] is not None:
        right.axhline(dial["dense"], color="black", linestyle=":", label="dense")
    right.set(xlabel="reached capacity", ylabel="exact match, held out")
    right.legend(fontsize=8)
    return _save(figure, path)


def quality_figure(pareto: dict[str, Any], path: Path) -> Path:
    """Exact match over measured time relative to dense: prompts at the left, generation at the right."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained", sharey=True)
    names = list(dict.fromkeys((p["system"], p["granularity"]) for p in pareto["points"]))
    for axis, key, title in zip(axes, ("prefill_time", "generate_time"), ("prompts", "generation"), strict=True):
        for place, name in enumerate(names):
            points = sorted(
                (p for p in pareto["points"] if (p["system"], p["granularity"]) == name), key=lambda p: p["budget"]
            )
            static = name[0].startswith("static")
            axis.plot(
                [p[key] for p in points],
                [p["exact_match"] for p in points],
                marker=_MARKS[place % len(_MARKS)],
                linestyle="--" if static else "-",
                alpha=0.6 if static else 1.0,
                label=f"{name[0]}: {name[1]}",
            )
        if pareto["dense"] is not None:
            axis.plot([1.0], [pareto["dense"]], "k*", markersize=10, label="dense")
        axis.set(xlabel=f"time of {title} relative to dense")
    axes[0].set(ylabel="exact match, held out")
    axes[1].legend(fontsize=6)
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    # A fixed salt and no date: the same numbers give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "router-tuning"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    plt.close(figure)
    temporary.replace(path)
    return path
