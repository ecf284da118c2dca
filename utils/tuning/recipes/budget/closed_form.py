"""Routers in closed form, from what skipping would do; no training step.

The damage of skipping a module (:mod:`damage`) is a square with a Gaussian in it, of which only the mean depends on
the token or sequence: a gamma regression with a logarithmic link predicts it from what the router sees. For any budget
the best choice then skips what has the least expected damage per operation that is saved, so a router's score is the
logarithm of the one and its threshold, but for a shift common to all, the logarithm of the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from router_tuning.model import routed_modules
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.recipes.budget.damage import Damage, damage_in_parts
from router_tuning.tuning.recipes.budget.gates import RIDGE, curve_of, router_of

_AT_ONCE = 2**31
"""Bytes: routers whose inputs fit here together are labelled in one pass over the tokens."""
_FEWEST = 20  # decisions; an expert that has fewer is taken for like the others
_HELD_OUT = 0.2
_STEPS = (0.5,) * 20 + (0.25,) * 10
_CLIP = 40.0  # times what is expected: single damages are heavy-tailed
_CAP = 50.0  # nats: far beyond what second order can say
_SLOPES = (0.05, 1.2)  # not zero: a router which finds nothing still ranks, so that every share can be reached
_LIMIT = 15.0  # of threshold logits, beyond which σ has no room for them


class RouterFit(NamedTuple):
    """``log E[d | h] = weight·h + bias``. ``slope``: what of the first fit held on tokens it had not seen."""

    weight: Tensor
    bias: float
    slope: float


def fit_routers(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], seed: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Fit all routers in place.

    Args:
        batches: inputs of the model's forward with ``labels``; on the first fifth it is seen what generalises.

    Returns:
        Threshold logits by router, at which half of the routed operations run and which one common shift moves to any
        budget; and what skipping each module everywhere would cost, in nats per decision.
    """
    modules, saved = routed_modules(model), saved_shares(model)
    logit, damages, above = {}, {}, []
    for name, found in damage_in_parts(model, batches, list(modules), seed, _AT_ONCE):
        found = Damage(*(part.to(model.device) for part in found))
        weight, bias = _fit_experts(found) if modules[name].mod_part == "expert" else _fit(found)
        # Routers have no bias: a fit's constant is part of its threshold, beside the logarithm of what skipping saves.
        logit[name] = math.log(saved[name] * len(found.decided) / int(found.decided.sum())) - bias
        above.append((found.hidden.float() @ weight.T)[found.decided] - logit[name])
        damages[name] = found.mean()
        with torch.no_grad():
            router_of(modules[name]).weight.copy_(weight)
    middle = float(curve_of(above, [saved[name] for name in logit], torch.tensor([0.5])))
    return {name: value + middle for name, value in logit.items()}, damages


def _fit(found: Damage) -> tuple[Tensor, float]:
    """Weight ``[1, d]`` and constant."""
    fit = fit_router(found.hidden, found.damage[:, 0])
    return fit.weight[None], fit.bias


def _fit_experts(found: Damage) -> tuple[Tensor, float]:
    """Weights ``[E, d]`` and their common constant: what an expert's own adds to it goes along the mean input."""
    common, mean = math.log(max(found.mean(), 1e-12)), found.hidden.float().mean(0)
    weight = mean.new_zeros(found.decided.shape[1], len(mean))
    for expert, chosen in enumerate(found.decided.T):
        if int(chosen.sum()) >= _FEWEST:
            fit = fit_router(found.hidden[chosen], found.damage[chosen, expert])
            weight[expert] = fit.weight + (fit.bias - common) * mean / mean.square().sum()
    return weight, common


@torch.no_grad()
def within_limits(model: nn.Module, logit: Mapping[str, float]) -> dict[str, float]:
    """Scale routers and their threshold logits alike until σ has room for all of these; they decide as before."""
    modules = routed_modules(model)
    scale = min(1.0, _LIMIT / max(1.0, *(abs(value) for value in logit.values())))
    for name in logit:
        router_of(modules[name]).weight.mul_(scale)
    return {name: scale * value for name, value in logit.items()}


@torch.no_grad()
def fit_router(hidden: Tensor, damage: Tensor) -> RouterFit:
    """Gamma regression with a logarithmic link of ``damage [n]`` on ``hidden [n, d]``.

    Fisher scoring with the curvature at the start, damped and stopped early; then slope and constant are fitted anew
    on the first fifth of the tokens, left out before, so that what does not generalise is shrunk.
    """
    held = int(len(hidden) * _HELD_OUT)
    centre = hidden[held:].float().mean(0)
    damage = damage.clamp(max=_CAP)
    unseen, x = hidden[:held].float() - centre, hidden[held:].float() - centre
    curvature = x.T @ x / len(x)
    curvature.diagonal().add_(RIDGE * curvature.diagonal().mean())
    factor = torch.linalg.cholesky(curvature)
    weight, bias = torch.zeros_like(centre), damage[held:].mean().clamp(min=1e-12).log()
    for rate in _STEPS:
        excess = _excess(damage[held:], x @ weight + bias)
        bias = bias + rate * excess.mean()
        weight = weight + rate * torch.cholesky_solve((x.T @ (excess - excess.mean()) / len(x))[:, None], factor)[:, 0]
    z = unseen @ weight
    middle, spread = z.mean(), z.var().clamp(min=1e-12)
    z, bias, slope = z - middle, bias + middle, torch.ones_like(bias)
    for _ in range(60):
        excess = _excess(damage[:held], slope * z + bias)
        bias = bias + 0.3 * excess.mean()
        slope = (slope + 0.3 * (excess * z).mean() / spread).clamp(*_SLOPES)
    weight = slope * weight
    return RouterFit(weight, float(bias - slope * middle - centre @ weight), float(slope))


def _excess(damage: Tensor, z: Tensor) -> Tensor:
    """How far damages exceed ``exp(z)``, in units of it."""
    return (damage * torch.exp(-z)).clamp(max=_CLIP) - 1
