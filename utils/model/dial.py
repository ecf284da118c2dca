"""The budget dial: thresholds for any share of the routed work, calibrated on data after the routers are trained.

Policies lie on one line, from thresholds that nothing passes to thresholds that everything passes. A threshold moved
in a shallow layer changes what deeper routers see, so the share that a policy runs is known from a pass under that
very policy. A few such passes are taken, each in the widest gap that the earlier ones have left; what lies between two
of them is read off the scores that both have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .flops import saved_shares
from .recording import record_routing
from .routed import Routed
from .routing import routed_modules, run_decoder
from .skip_path import first_tokens

GRID = (0.0, 0.01, 0.02, *(round(0.05 * step, 2) for step in range(1, 20)), 0.98, 0.99, 1.0)
"""Shares with a threshold of their own; the last scores are outliers, far from which shares end between them."""
GAP = 0.2
"""Shares of the routed work closer than this need no pass between them."""
_MARGIN = 1e-3  # places: thresholds of the end points lie this far outside the scores
Batch = Mapping[str, Tensor]


@torch.no_grad()
def router_logits(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Logits of every router on its real rows or tokens under the thresholds as they are, by ``"<layer>.<part>"``.

    Tokens that run whatever the router says have an infinite one.

    Args:
        batches: inputs of the model's forward, without labels or with (``router_pooling="prompt"`` reads them).
    """
    modules = routed_modules(model)
    names = {module.mod_key: name for name, module in modules.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    for batch in batches:
        mask = batch.get("attention_mask")
        first = first_tokens(batch["input_ids"].shape, mask, batch.get("position_ids"), 0, None, torch.device("cpu"))
        with record_routing(model) as log:
            run_decoder(model, batch)
        for key, records in log.records.items():
            always = modules[names[key]].mod_skip is not None and modules[names[key]].mod_level == "token"
            for record in records:
                if record.logits is None:
                    raise ValueError(f"router {names[key]}: its decision is forced; calibrate outside force_routing")
                logits = record.logits.float().cpu()
                logits = logits.masked_fill(first, math.inf) if always else logits
                found[names[key]].append(logits.flatten() if record.real is None else logits[record.real.cpu()])
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def shares_at(logits: Mapping[str, Tensor], threshold: Mapping[str, float]) -> dict[str, float]:
    """Share at or above its threshold, by router."""
    return {name: float((values >= threshold[name]).float().mean()) for name, values in logits.items()}


def capacity_at(logits: Mapping[str, Tensor], threshold: Mapping[str, float]) -> float:
    """Mean over routers of the share at or above its threshold."""
    return sum(shares_at(logits, threshold).values()) / len(logits)


def logits_at(dial: Mapping[str, Any], budget: float, axis: str = "capacity") -> dict[str, float]:
    """Threshold logits of a dial by router, linear between its points and those of the outermost beyond them.

    Args:
        axis: what ``budget`` is a share of: ``capacity`` (mean over routers) or ``flops`` (of the decoder).
    """
    grid = dial[axis]
    upper = next((i for i, c in enumerate(grid) if c >= budget), len(grid) - 1)
    lower = max(upper - 1, 0)
    span = grid[upper] - grid[lower]
    share = 0.0 if span == 0 else min(max((budget - grid[lower]) / span, 0.0), 1.0)
    return {name: row[lower] + share * (row[upper] - row[lower]) for name, row in dial["logit"].items()}


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    start: Mapping[str, Any] | None = None,
    grid: Sequence[float] = GRID,
    passes: int = 16,
) -> dict[str, Any]:
    """Thresholds by budget, ``{"capacity": [c], "flops": [f], "logit": {"<layer>.<part>": [per c]}}``, ascending.

    Without ``start`` all routers have one threshold, which moves. The model's own are as before when this returns.

    Args:
        start: an earlier dial, for instance of another data set, or one with thresholds learnt per budget: the line
            then runs through its points.
        grid: ascending shares, from 0 to 1, of the routed operations, for which thresholds are given.
        passes: most passes over ``batches``. Six or seven are enough but where a router's decisions move all scores of
            a deeper one.

    Raises:
        ValueError: if the routers cannot tell inputs apart, so that no threshold gives a share between 0 and 1.
    """
    modules, saved = routed_modules(model), saved_shares(model)
    whole = sum(saved.values())
    weight = {name: share / whole for name, share in saved.items()}
    before = {name: module.mod_logit for name, module in modules.items()}
    try:
        ends = []
        for outermost in (math.inf, -math.inf):
            _set(modules, dict.fromkeys(modules, outermost))
            ends.append(router_logits(model, batches))
        if all(bool((values == values[0]).all()) for values in ends[1].values()):
            raise ValueError("no threshold gives a share between 0 and 1: the routers give all inputs the same score")
        line = _Line(start or {"capacity": [0.5], "logit": dict.fromkeys(modules, [0.0])}, ends, weight)
        points = [_Point(line.left, line.share(ends[0], line.left), ends[0]), _Point(line.right, 1.0, ends[1])]
        for _ in range(passes - 2):
            widest = max(range(len(points) - 1), key=lambda i: points[i + 1].share - points[i].share)
            below, above = points[widest : widest + 2]
            if above.share - below.share <= GAP:
                break
            place = line.between(below, above, (below.share + above.share) / 2)
            _set(modules, line.at(place))
            logits = router_logits(model, batches)
            share = min(max(line.share(logits, place), below.share), above.share)
            points.insert(widest + 1, _Point(place, share, logits))
    finally:
        _set(modules, before)
    return _table(line, points, grid, whole)


class _Point(NamedTuple):
    """A policy under which a pass was taken: its place on the line, the share that ran, and the scores."""

    place: float
    share: float
    logits: dict[str, Tensor]


class _Line:
    """Policies by place: the thresholds of a dial at its points, moved together beyond the first and the last."""

    def __init__(self, dial: Mapping[str, Any], logits: Sequence[Mapping[str, Tensor]], weight: Mapping[str, float]):
        self.dial, self.weight = dial, weight
        away = (
            (values[values.isfinite()] - row).abs().max()
            for seen in logits
            for name, values in seen.items()
            for row in (dial["logit"][name][0], dial["logit"][name][-1])
            if bool(values.isfinite().any())
        )
        self.step = 1.01 * float(max(away)) + 1e-6  # one place further, no score is left on this side
        self.left, self.right = dial["capacity"][0] - 1.0, dial["capacity"][-1] + 1.0

    def at(self, place: float) -> dict[str, float]:
        """Threshold logits; they fall, and more runs, from left to right."""
        grid = self.dial["capacity"]
        beyond = place - min(max(place, grid[0]), grid[-1])
        return {name: logit - self.step * beyond for name, logit in logits_at(self.dial, place).items()}

    def share(self, logits: Mapping[str, Tensor], place: float) -> float:
        """Share of the routed operations that run at ``place`` with these scores."""
        return sum(self.weight[name] * share for name, share in shares_at(logits, self.at(place)).items())

    def find(self, logits: Mapping[str, Tensor], share: float) -> float:
        """The place, the leftmost to within rounding, where ``share`` runs with these scores."""
        left, right = self.left, self.right
        for _ in range(40):
            middle = (left + right) / 2
            left, right = (left, middle) if self.share(logits, middle) >= share - 1e-9 else (middle, right)
        return right

    def between(self, below: _Point, above: _Point, share: float) -> float:
        """Where ``share`` runs: between what the scores of both policies say, by distance; else half way."""
        part = (share - below.share) / max(above.share - below.share, 1e-9)
        place = (1 - part) * self.find(below.logits, share) + part * self.find(above.logits, share)
        return place if below.place < place < above.place else (below.place + above.place) / 2


def _table(line: _Line, points: Sequence[_Point], grid: Sequence[float], whole: float) -> dict[str, Any]:
    """The dial for the ``grid``; shares below that of tokens which always run are raised to it."""
    dial: dict[str, Any] = {"capacity": [], "flops": [], "logit": {name: [] for name in line.weight}}
    for wanted in grid:
        share = max(wanted, points[0].share)
        below, above = next(pair for pair in pairwise(points) if share <= pair[1].share)
        if share == points[0].share:
            place = line.find(below.logits, share + 1e-6) - _MARGIN
        elif share == 1:
            place = line.find(above.logits, 1.0) + _MARGIN
        else:
            place = line.between(below, above, share)
        part = (share - below.share) / max(above.share - below.share, 1e-9)
        threshold = line.at(place)
        capacity = (1 - part) * capacity_at(below.logits, threshold) + part * capacity_at(above.logits, threshold)
        dial["capacity"].append(max([capacity, *dial["capacity"][-1:]]))
        dial["flops"].append(1.0 - whole * (1.0 - share))
        for name, logit in threshold.items():
            dial["logit"][name].append(logit)
    return dial


def _set(modules: Mapping[str, Routed], logit: Mapping[str, float]) -> None:
    for name, module in modules.items():
        module.mod_logit = logit[name]
