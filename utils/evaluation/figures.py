"""Quality against operations, drawn."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from router_tuning.evaluation.records import Record, grouped, score_names  # noqa: E402
from router_tuning.files import publish  # noqa: E402

_LINES = {"routed": "o-", "static": "s--", "random": "x:"}


def quality_figure(records: Sequence[Record], path: Path) -> Path | None:
    """Mean score and divergence over the share of operations, a line per policy; None if nothing can be drawn."""
    groups, names = grouped(records), score_names(records)
    if not names:
        return None
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        lines: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for group in (group for group in groups if group.score(name)):
            key = (group.cell["policy"], group.label, group.cell.get("granularity") or "")
            spent = statistics.fmean(group.spent(name) or group.values("capacity"))
            lines.setdefault(key, []).append((spent, statistics.fmean(group.score(name))))
        for (policy, label, granularity), points in lines.items():
            if policy == "dense":
                axis.axhline(points[0][1], color="black", linestyle=":", label=label)
            else:
                axis.plot(*zip(*sorted(points), strict=True), _LINES[policy.split("_")[0]], markersize=4, alpha=0.8,
                          label=f"{label}: {granularity}")  # fmt: skip
        axis.set(xlabel="share of the decoder's operations", ylabel=name)
    axes[0][-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure; a fixed salt and no date give the same bytes for the same numbers."""
    svg = path.suffix == ".svg"
    with publish(path) as draft, matplotlib.rc_context({"svg.hashsalt": "router-tuning"}):
        figure.savefig(draft, dpi=150, metadata={"Date": None} if svg else None)
    plt.close(figure)
    return path
