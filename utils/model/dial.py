"""The budget dial: thresholds for any share of the routed work, calibrated on data after the routers are trained.

A threshold moved in a shallow layer changes what deeper routers see. Each point of the dial is therefore calibrated
under its own policy, with the capacity that real forward passes reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .recording import record_routing
from .routed import Routed
from .routing import routed_modules

GRID = tuple(round(0.05 * step, 2) for step in range(21))
_MARGIN = 1e-3  # of the spread of logits: thresholds of the end points lie this far outside
Batch = Mapping[str, Tensor]


@torch.no_grad()
def router_logits(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Logits of every router on its real rows or tokens under the thresholds as they are, by ``"<layer>.<part>"``.

    Args:
        batches: inputs of the model's forward, without labels or with (``router_pooling="prompt"`` reads them).
    """
    names = {module.mod_key: name for name, module in routed_modules(model).items()}
    found: dict[str, list[Tensor]] = {name: [] for name in names.values()}
    device = next(model.parameters()).device
    for batch in batches:
        with record_routing(model) as log:
            model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)
        for key, records in log.records.items():
            for record in records:
                if record.logits is None:
                    raise ValueError(f"router {names[key]}: its decision is forced; calibrate outside force_routing")
                logits = record.logits if record.real is None else record.logits[record.real]
                found[names[key]].append(logits.flatten().float().cpu())
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def capacity_at(logits: Mapping[str, Tensor], threshold: Mapping[str, float]) -> float:
    """Mean over routers of the share at or above its threshold."""
    return sum(float((values >= threshold[name]).float().mean()) for name, values in logits.items()) / len(logits)


def logits_at(dial: Mapping[str, Any], capacity: float) -> dict[str, float]:
    """Threshold logits of a dial by router, linear between its points and those of the outermost beyond them."""
    grid = dial["capacity"]
    upper = next((i for i, c in enumerate(grid) if c >= capacity), len(grid) - 1)
    lower = max(upper - 1, 0)
    span = grid[upper] - grid[lower]
    share = 0.0 if span == 0 else min(max((capacity - grid[lower]) / span, 0.0), 1.0)
    return {name: row[lower] + share * (row[upper] - row[lower]) for name, row in dial["logit"].items()}


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    start: Mapping[str, Any] | None = None,
    capacity: Sequence[float] = GRID,
    rounds: int = 16,
    tolerance: float = 0.004,
) -> dict[str, Any]:
    """Thresholds by budget, ``{"capacity": [c], "logit": {"<layer>.<part>": [per c]}, "reached": [c]}``.

    At every point one shift, the same for all routers, is added to the thresholds that ``start`` holds for it (to
    zero without ``start``), until real forward passes over ``batches`` reach the budget. The model's own thresholds
    are as before when this returns.

    Args:
        start: an earlier dial, for instance of another data set, or one with thresholds learnt per budget.
        capacity: ascending budgets from 0 to 1.
        rounds: most passes over ``batches`` per point. One or two are enough but where a router's decisions move all
            scores of a deeper one.
        tolerance: how close to a budget is close enough, at least half a decision.

    Raises:
        ValueError: if the routers cannot tell inputs apart, so that no threshold gives a share between 0 and 1.
    """
    modules = routed_modules(model)
    logit: dict[str, list[float]] = {name: [] for name in modules}
    reached = []
    with _thresholds_kept(modules):
        logits = router_logits(model, batches)
        if all(bool((values == values[0]).all()) for values in logits.values()):
            raise ValueError("no threshold gives a share between 0 and 1: the routers give all inputs the same score")
        tolerance = max(tolerance, 0.5 / sum(len(values) for values in logits.values()))
        for point in capacity:
            base = logits_at(start, point) if start else dict.fromkeys(modules, 0.0)
            # The policy of the point before is close to this one: its logits are the first guess.
            found, share, logits = _solve(model, modules, batches, point, base, logits, rounds, tolerance)
            reached.append(share)
            for name, value in found.items():
                logit[name].append(value)
    return {"capacity": [float(c) for c in capacity], "logit": logit, "reached": reached}


def _solve(model, modules, batches, point, base, logits, rounds, tolerance) -> tuple[dict, float, dict]:
    """Thresholds ``base + shift`` whose measured capacity is closest to ``point``, that capacity, the last logits."""
    best: tuple[float, dict[str, float], float] | None = None
    low, high = None, None  # shifts measured to give too much, and too little
    for _ in range(rounds):
        shift = _shift_for(logits, base, point)
        if low is not None and shift <= low or high is not None and shift >= high:
            # Scores that move with the policy can send the estimate back and forth: halve the bracket instead.
            if low is None or high is None:
                break
            shift = (low + high) / 2
        threshold = {name: value + shift for name, value in base.items()}
        _set(modules, threshold)
        logits = router_logits(model, batches)
        share = capacity_at(logits, threshold)
        if best is None or abs(share - point) < best[0]:
            best = (abs(share - point), threshold, share)
        if abs(share - point) <= tolerance:
            break
        if share > point:
            low = shift
        else:
            high = shift
    return *best[1:], logits


def _shift_for(logits: Mapping[str, Tensor], base: Mapping[str, float], point: float) -> float:
    """The shift of all thresholds under which ``point`` of the recorded logits, each router alike, stays above."""
    moved = torch.cat([values - base[name] for name, values in logits.items()]).double()
    weight = torch.cat([torch.full((len(values),), 1 / len(values), dtype=torch.double) for values in logits.values()])
    moved, order = moved.sort(descending=True)
    margin = _MARGIN * float((moved[0] - moved[-1]).clamp(min=1e-6))
    if point <= 0:
        return float(moved[0]) + margin
    if point >= 1:
        return float(moved[-1]) - margin
    share = weight[order].cumsum(0) / len(logits)
    last = int((share <= point + 1e-9).sum())  # how many of the sorted values stay above
    above = float(moved[last - 1]) if last else float(moved[0]) + margin
    below = float(moved[last]) if last < len(moved) else float(moved[-1]) - margin
    return (above + below) / 2


def _set(modules: Mapping[str, Routed], logit: Mapping[str, float]) -> None:
    for name, module in modules.items():
        module.mod_logit = logit[name]


@contextmanager
def _thresholds_kept(modules: Mapping[str, Routed]) -> Iterator[None]:
    before = {name: module.mod_logit for name, module in modules.items()}
    try:
        yield
    finally:
        _set(modules, before)
