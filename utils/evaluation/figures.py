"""The two figures of a run: capacity by layer over training, and quality against compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from router_tuning.tuning.routing_statistics import CAPACITY  # noqa: E402

LAYER = f"{CAPACITY}_layer_"


def capacity_figure(log: Sequence[Mapping[str, Any]], path: Path, target: float | None = None) -> Path:
    """Capacity of every router, and of all, over the training steps.

    ``log`` holds dicts with ``step``, ``capacity`` and ``capacity_layer_<router>`` entries; others are ignored.
    Raises ValueError if no entry has them.
    """
    rows = [row for row in log if "step" in row and any(key.startswith(LAYER) for key in row)]
    if not rows:
        raise ValueError(f"the training log holds no {LAYER}… entries")
    routers = sorted(key for key in rows[0] if key.startswith(LAYER))
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    colours = matplotlib.colormaps["viridis"](_spread(len(routers)))
    for router, colour in zip(routers, colours, strict=True):
        axes.plot(*_series(rows, router), color=colour, label=f"layer {router.removeprefix(LAYER)}")
    axes.plot(*_series(rows, CAPACITY), color="black", linewidth=2, label="all")
    if target is not None:
        axes.axhline(target, color="grey", linestyle=":", label=f"target {target:g}")
    axes.set(xlabel="optimizer step", ylabel="capacity (share run)", ylim=(-0.03, 1.03))
    axes.legend(fontsize=7, ncols=2)
    return _save(figure, path)


def quality_figure(systems: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Score against the share of the dense FLOPs, one mark per system of :func:`results.headline`."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    static = sorted((s for s in systems if s["name"].startswith("static")), key=lambda s: s["flops_share"])
    if static:
        line = {"marker": "s", "color": "tab:grey", "linestyle": "--", "label": "best static drop"}
        axes.plot([s["flops_share"] for s in static], [s["score"] for s in static], **line)
    for name, marker, colour in (("dense", "o", "black"), ("tuned", "*", "tab:red")):
        for system in (s for s in systems if s["name"] == name):
            axes.scatter(
                system["flops_share"], system["score"], marker=marker, color=colour, s=90, label=name, zorder=3
            )
    for system in systems:
        text = f"{system['name']}, capacity {system['capacity']:.2f}"
        axes.annotate(text, (system["flops_share"], system["score"]), (4, 5), textcoords="offset points", fontsize=7)
    axes.set(xlabel="share of the dense FLOPs", ylabel=f"average {systems[0]['metric']}")
    axes.margins(0.18)
    axes.legend(fontsize=8, loc="lower right")
    return _save(figure, path)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    kept = [row for row in rows if key in row]
    return [row["step"] for row in kept], [row[key] for row in kept]


def _spread(count: int) -> list[float]:
    return [0.9 * place / max(count - 1, 1) for place in range(count)]


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format=path.suffix.removeprefix("."))
    plt.close(figure)
    temporary.replace(path)
    return path
