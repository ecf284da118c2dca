"""Routers that spend a budget where it pays: the expected score of a policy, maximised on explored masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot
from tqdm import trange

from router_tuning.tuning.recipes.budget.search import Explored


@dataclass
class Policy:
    """One weight vector per router for all budgets, one threshold per router and budget.

    Attributes:
        weight: ``[R, d]`` on raw pooled features. budgets: ascending. logit: ``[R, C]``: router r keeps an input at
            budget c if ``W_r·h ≥ logit[r, c]``.
    """

    weight: Tensor
    budgets: list[float]
    logit: Tensor


@dataclass(frozen=True)
class FitSettings:
    """How :func:`fit` optimises."""

    steps: int = 400
    batch: int = 512
    learning_rate: float = 0.03
    weight_decay: float = 1e-2
    capacity_weight: float = 30.0
    entropy: float = 0.1
    seed: int = 0


def fit(explored: Explored, budgets: Sequence[float], settings: FitSettings | None = None) -> Policy:
    """Maximise the mean over inputs and budgets of ``E_π[score]`` under ``E_π[kept] = budget``.

    ``π(m | x) = Π_r σ(±(w_r·f_r + b_{r,c}))`` over the routers in the order in which they run, each on the features
    that the earlier decisions leave it. Where all masks are listed the expectation is exact and has no sampling
    noise; where masks were sampled it is the self-normalised importance estimate. Features are standardised for
    the fit; mean and scale are folded into the weights and thresholds returned.
    """
    settings = settings or FitSettings()
    generator = torch.Generator().manual_seed(settings.seed)
    mean, scale, features = _standardised(explored.features)
    score, kept, proposal, masks = _normalised(explored.score), explored.kept, explored.proposal, explored.masks
    inputs, routers, width = score.shape[0], len(features), features[0].shape[-1]
    wanted = torch.tensor(budgets, dtype=torch.float32)
    weight = torch.zeros(routers, width, requires_grad=True)
    bias = (torch.logit(wanted.clamp(0.03, 0.97))[:, None].repeat(1, routers)).requires_grad_()
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight], "weight_decay": settings.weight_decay / settings.learning_rate},
            {"params": [bias], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    for step in trange(settings.steps, desc="fit routers", leave=False):
        rows = torch.randperm(inputs, generator=generator)[: settings.batch]
        log_pi = _log_policy(
            features, explored.states, masks if masks.shape[0] == 1 else masks[rows], rows, weight, bias
        )
        chance = torch.softmax(log_pi - (proposal if proposal.shape[0] == 1 else proposal[rows]), dim=-1)
        value = (chance * score[rows]).sum(-1).mean(1)  # [C]
        used = (chance * (kept if kept.shape[0] == 1 else kept[rows])).sum(-1).mean(1)
        entropy = -(chance * chance.clamp(min=1e-9).log()).sum(-1).mean(1)
        warmth = settings.entropy * max(0.0, 1 - 1.5 * step / settings.steps)
        loss = (-value + settings.capacity_weight * (used - wanted) ** 2 - warmth * entropy).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        folded = weight / scale
        return Policy(folded, list(budgets), (folded * mean).sum(-1)[:, None] - bias.T)


def _log_policy(
    features: list[Tensor], states: list[Tensor], masks: Tensor, rows: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """``log π(m | x)`` of every budget, input and mask, ``[C, n, K]``."""
    total: Tensor | float = 0.0
    for r, feature in enumerate(features):
        logit = (feature[rows].float() @ weight[r])[None] + bias[:, r, None, None]  # [C, n, S]
        run, skip = logsigmoid(logit), logsigmoid(-logit)
        if masks.shape[0] == 1:
            # A product with a 0/1 matrix: on a CPU many times faster than indexing and its backward.
            picked = one_hot(states[r], logit.shape[-1]).float().T  # [S, K]
            kept = masks[0, :, r].float()
            total = total + run @ (picked * kept) + skip @ (picked * (1 - kept))
        else:
            total = total + torch.where(masks[..., r], run[..., states[r]], skip[..., states[r]])
    return total


def _standardised(features: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Mean and scale ``[R, d]``, and the features with both taken out, in float16."""
    flat = [feature.float().flatten(0, 1) for feature in features]
    mean = torch.stack([f.mean(0) for f in flat])
    scale = torch.stack([f.std(0) for f in flat]).clamp(min=1e-4)
    # √d keeps the logit's scale, and so the learning rate, independent of the width.
    scale = scale * math.sqrt(features[0].shape[-1]) / 4
    return mean, scale, [((f.float() - m) / s).half() for f, m, s in zip(features, mean, scale, strict=True)]


def _normalised(score: Tensor) -> Tensor:
    """Score in units of what masks make of it on average, so that one weight of the budget fits all data."""
    spread = score.std(dim=1).mean().clamp(min=1e-6)
    return (score - score.mean(1, keepdim=True)) / spread
