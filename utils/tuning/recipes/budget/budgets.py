"""What holds routers to their budgets while they train: biases, thresholds by budget, and how well scores predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BINS = 5
"""Ranges of budgets that are told apart in how far scores are off."""
_KEEPS = 0.95  # of the running sums, by row


class Budgets:
    """State of the routers beside their weights, common to all processes, kept in checkpoints.

    Attributes:
        bias: by router. ridge: under what routers see, in mean variances.
        curve: the threshold of each budget of ``grid``.
        ratio: ``[bins, 2]``, running sums of damage and of what scores predict, by budget.
        seen: decisions learnt from, by router.
    """

    def __init__(self, bias: Mapping[str, float], ridge: float, lowest: float, highest: float = 0.95) -> None:
        self.bias, self.ridge, self.lowest, self.highest = dict(bias), ridge, lowest, highest
        self.grid = torch.linspace(max(0.02, lowest - 0.2), 0.99, 50)
        self.curve: Tensor
        self.ratio = torch.full((BINS, 2), 1e-9, dtype=torch.float64)
        self.seen = dict.fromkeys(bias, 0.0)

    def draw(self, rows: int) -> Tensor:
        """Budgets ``[rows]``, spread evenly over the range."""
        return self.lowest + (self.highest - self.lowest) * (torch.rand(rows) + torch.randperm(rows)) / rows

    def threshold(self, budget: Tensor) -> Tensor:
        """Of each budget, ``[b]``."""
        return self.curve[(budget[:, None] - self.grid).abs().argmin(1)]

    def bins(self, budget: Tensor) -> Tensor:
        """In which range each budget lies, int64 ``[b]``."""
        share = (budget - self.lowest) / max(self.highest - self.lowest, 1e-9)
        return (share * BINS).long().clamp(0, BINS - 1)

    def ratio_with(self, found: Tensor, rows: Tensor) -> Tensor:
        """The running sums with those that ``rows [bins]`` rows have added."""
        return _KEEPS ** rows[:, None] * self.ratio + found

    def follow(self, curve: Tensor) -> None:
        """Move thresholds towards those that the scores ask for now."""
        self.curve = 0.8 * self.curve + 0.2 * curve.float()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON takes it."""
        kept = {"bias": self.bias, "ridge": self.ridge, "seen": self.seen}
        return kept | {"curve": self.curve.tolist(), "ratio": self.ratio.tolist()}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.bias, self.seen, self.ridge = dict(kept["bias"]), dict(kept["seen"]), kept["ridge"]
        self.curve, self.ratio = torch.tensor(kept["curve"]), torch.tensor(kept["ratio"], dtype=torch.float64)
