"""The figure of the speed benchmark: time ratio against capacity, measured and ideal, one panel per phase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def draw_speed(rows: list[dict[str, Any]], path: Path) -> None:
    """Write an SVG with a panel per (phase, batch, length) and a line per granularity; dashed is the ideal."""
    cells = sorted({(row["phase"], row["batch"], row["length"]) for row in rows}, reverse=True)
    figure, panels = plt.subplots(1, len(cells), figsize=(5.2 * len(cells), 4), squeeze=False, layout="constrained")
    for panel, cell in zip(panels[0], cells, strict=True):
        here = [row for row in rows if (row["phase"], row["batch"], row["length"]) == cell]
        names = list(dict.fromkeys((row["granularity"], row["kv_policy"]) for row in here))
        for number, (granularity, policy) in enumerate(names):
            line = sorted(
                (row for row in here if (row["granularity"], row["kv_policy"]) == (granularity, policy)),
                key=lambda row: row["capacity"],
            )
            label = granularity + (" (drop)" if policy == "drop" else "")
            shares = [row["capacity"] for row in line]
            colour = f"C{number}"
            panel.plot(shares, [row["time_ratio"] for row in line], "o-", color=colour, label=label, markersize=3)
            panel.plot(shares, [row["ideal_ratio"] for row in line], "--", color=colour, linewidth=0.8)
        panel.axhline(1, color="0.6", linewidth=0.8)
        panel.set(title=f"{cell[0]}, {cell[1]} × {cell[2]} tokens", xlabel="capacity (executed share)")
        panel.set_ylabel("time, routed / dense")
    panels[0][0].legend(fontsize=8, title="dashed: ideal", title_fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
