"""The control that a router has to beat: the best fixed set of routed modules to keep, found by search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from router_tuning.model import force_routing

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StaticDrop:
    """A fixed mask: the layers of ``kept`` run for every input; ``loss`` is its loss on the search split."""

    kept: tuple[int, ...]
    layers: tuple[int, ...]
    loss: float
    method: str

    @property
    def capacity(self) -> float:
        """Share of the routed modules that run."""
        return len(self.kept) / len(self.layers)

    def mask(self) -> dict[int, bool]:
        """The mask in the form that ``force_routing`` takes."""
        return {layer: layer in self.kept for layer in self.layers}


@torch.no_grad()
def answer_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy in nats of the labelled tokens of ``input_ids, attention_mask, labels [b, t]``."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        target = batch["labels"][:, 1:]
        total += cross_entropy(logits[:, :-1][target != -100].float(), target[target != -100], reduction="sum").item()
        count += int((target != -100).sum())
    return total / count


def best_static(
    model: PreTrainedModel, layers: Sequence[int], keep_count: int, batches: Sequence[Batch], max_masks: int = 1000
) -> StaticDrop:
    """The mask of ``keep_count`` of the routed ``layers`` with the lowest :func:`answer_loss`.

    Every mask of that size is tried if there are at most ``max_masks``; otherwise modules are dropped one by one,
    each time the one whose loss costs least (``method`` says which was done).
    """
    if not 0 <= keep_count <= len(layers):
        raise ValueError(f"keep_count {keep_count} must lie in 0…{len(layers)}, the number of routed layers")
    if comb(len(layers), keep_count) <= max_masks:
        masks = tqdm(list(combinations(layers, keep_count)), desc=f"static drop, keep {keep_count}", leave=False)
        return min((_scored(model, kept, layers, batches, "exhaustive") for kept in masks), key=lambda drop: drop.loss)
    best = _scored(model, tuple(layers), layers, batches, "greedy")
    for _ in tqdm(range(len(layers) - keep_count), desc=f"static drop, keep {keep_count}", leave=False):
        smaller = [tuple(kept for kept in best.kept if kept != layer) for layer in best.kept]
        best = min((_scored(model, kept, layers, batches, "greedy") for kept in smaller), key=lambda drop: drop.loss)
    return best


def _scored(
    model: PreTrainedModel, kept: tuple[int, ...], layers: Sequence[int], batches: Sequence[Batch], method: str
) -> StaticDrop:
    drop = StaticDrop(tuple(kept), tuple(layers), 0.0, method)
    with force_routing(model, drop.mask()):
        return StaticDrop(drop.kept, drop.layers, answer_loss(model, batches), method)
