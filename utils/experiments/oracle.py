"""How much depth allocation could gain: the best mask and budget for every task, chosen with the scores in hand."""

from __future__ import annotations

import torch
from torch import Tensor


def best_by_size(scores: Tensor, masks: Tensor) -> Tensor:
    """Best score of every group at every number of kept routers, ``[T, R+1]``.

    Args:
        scores: ``[T, K]``, mean score of group t under mask k. masks: bool ``[K, R]``, every size present.
    """
    kept = masks.sum(-1)
    return torch.stack([scores[:, kept == size].amax(1) for size in range(masks.shape[1] + 1)], dim=1)


def allocation_oracle(scores: Tensor, masks: Tensor, budget: float) -> float:
    """Mean score of groups of equal weight when each has its best mask and the mean kept share is at most ``budget``.

    Exact, by dynamic programming over groups and layers spent (a multiple-choice knapsack). The choice uses the same
    items that it is scored on: an upper bound, not a policy.
    """
    best = best_by_size(scores, masks)
    groups, sizes = best.shape
    routers = sizes - 1
    reach = torch.full((groups * routers + 1,), -float("inf"))
    reach[0] = 0.0
    for group in range(groups):
        options = []
        for size in range(sizes):
            moved = torch.full_like(reach, -float("inf"))
            moved[size:] = reach[: len(reach) - size] + best[group, size]
            options.append(moved)
        reach = torch.stack(options).amax(0)
    spent = int(budget * groups * routers + 1e-9)
    return float(reach[: spent + 1].max()) / groups


def static_curve(scores: Tensor, masks: Tensor, selected_by: Tensor) -> list[tuple[list[int], float]]:
    """Per size 0…R: routers kept by the mask that ``selected_by [K]`` (the higher the better) prefers; its score."""
    kept = masks.sum(-1)
    curve = []
    for size in range(masks.shape[1] + 1):
        candidates = (kept == size).nonzero().flatten()
        chosen = candidates[selected_by[candidates].argmax()]
        curve.append((masks[chosen].nonzero().flatten().tolist(), float(scores[:, chosen].mean())))
    return curve


def at_budget(curve: list[float], budget: float) -> float:
    """Score of a static policy at any budget: between two sizes, the mixture of their masks (linear)."""
    place = budget * (len(curve) - 1)
    lower = min(int(place), len(curve) - 2)
    return curve[lower] + (place - lower) * (curve[lower + 1] - curve[lower])
