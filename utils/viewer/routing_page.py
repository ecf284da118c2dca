"""One self-contained HTML page, and one static figure, from the data of :mod:`router_tuning.viewer.routing_trace`."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TEMPLATE = Path(__file__).with_name("routing_page.html")


def routing_page(data: Mapping[str, Any], title: str) -> str:
    """HTML with data, style and script inside: it opens from a disk, without a network.

    ``data`` holds ``routers, prompts, capacity, dynamics`` of :func:`routing_trace.collect`, ``dial`` (a curve, may be
    empty), ``training`` (``routing_history.json`` or None) and ``metadata`` (``{name: text}``).
    """
    # "</" would end the script element that carries the data.
    packed = (
        json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/").replace("<!--", "\\u003c!--")
    )
    page = TEMPLATE.read_text(encoding="utf-8")
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", packed)


def routing_figure(data: Mapping[str, Any], path: Path) -> Path:
    """Capacity by router and task as a heat map."""
    by_task, routers = data["capacity"]["by_task"], data["routers"]
    table = [[by_task[task][name] for task in by_task] for name in routers]
    size = (2.2 + 0.55 * len(by_task), 1.6 + 0.24 * len(routers))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(by_task)), list(by_task), fontsize=8, rotation=45, ha="right")
    axes.set_yticks(range(len(routers)), routers, fontsize=8)
    axes.set_ylabel("router (layer.part)")
    for y, row in enumerate(table):
        for x, share in enumerate(row):
            colour = "black" if share > 0.6 else "white"
            axes.text(x, y, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, label="share run")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
    plt.close(figure)
    temporary.replace(path)
    return path
