"""What holds routers to their budgets while they train: biases, thresholds by budget, and how well scores predict."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

BINS = 5
"""Ranges of budgets that are told apart in how far scores are off."""
_KEEPS = 0.95  # of the running sums, by row


class Budgets(TrainerCallback, ExportableState):
    """State of the routers beside their weights, common to all processes, kept in checkpoints.

    Attributes:
        bias: by router. ridge: under what routers see, in mean variances.
        curve: the threshold of each budget of ``grid``.
        ratio: ``[bins, 2]``, running sums of damage and of what scores predict, by budget.
        seen: decisions learnt from, by router. after_step: called when an optimizer step is complete.
    """

    after_step: Callable[[], None]

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

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """An optimizer step is complete."""
        self.after_step()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        kept = {"bias": self.bias, "ridge": self.ridge, "seen": self.seen}
        return {"args": {}, "attributes": kept | {"curve": self.curve.tolist(), "ratio": self.ratio.tolist()}}

    def restore(self, checkpoint: Path) -> None:
        """Inverse of :meth:`state`."""
        states = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["stateful_callbacks"]
        kept = states[type(self).__name__]["attributes"]
        self.bias, self.seen = dict(kept["bias"]), dict(kept["seen"])
        self.ridge, self.curve = kept["ridge"], torch.tensor(kept["curve"])
        self.ratio = torch.tensor(kept["ratio"], dtype=torch.float64)
