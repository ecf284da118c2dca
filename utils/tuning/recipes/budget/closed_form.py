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

from router_tuning.errors import UserError
from router_tuning.model import routed_modules
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.recipes.budget.damage import Damage, damage_in_parts
from router_tuning.tuning.recipes.budget.gates import Seen, curve_of, router_of

_AT_ONCE = 2**31
"""Bytes: routers whose inputs fit here together are labelled in one pass over the tokens."""
_FEWEST = 20  # decisions; an expert that has fewer is taken for like the others
_HELD_OUT = 0.2
_STEPS = (0.5,) * 20 + (0.25,) * 10
_CLIP = 40.0  # times what is expected: single damages are heavy-tailed
_CAP = 50.0  # nats: far beyond what second order can say
RIDGES = (5.0, 1.5, 0.5, 0.15)
"""Mean variances. Which one generalises differs by base: 5 on SmolLM2-135M, a tenth of it on the embedded base."""
_SLOPES = (0.05, 1.2)  # not zero: a router which finds nothing still ranks, so that every share can be reached
_HALF = torch.tensor([0.5])
_LIMIT = 15.0  # of threshold logits, beyond which σ has no room for them


class RouterFit(NamedTuple):
    """``log E[d | h] = weight·h + bias``.

    Attributes:
        deviance: on tokens that the fit had not seen, but for a constant.
    """

    weight: Tensor
    bias: float
    deviance: float


class Start(NamedTuple):
    """Where training begins.

    Attributes:
        logit: by router, thresholds at which half of the routed operations run and which one common shift moves to
            any budget. damage: what skipping each module everywhere would cost, in nats per decision.
        ridge: under what routers see, in mean variances.
    """

    logit: dict[str, float]
    damage: dict[str, float]
    ridge: float


def fit_routers(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], seed: int) -> Start:
    """Fit all routers in place, with the ridge of least deviance on tokens left out.

    Args:
        batches: inputs of the model's forward with ``labels``; on the first fifth it is seen what generalises.
    """
    modules, saved = routed_modules(model), saved_shares(model)
    fits: dict[str, list[RouterFit]] = {}
    above: dict[str, list[Tensor]] = {}
    logit, damage = {}, {}
    for name, found in damage_in_parts(model, batches, list(modules), seed, _AT_ONCE):
        found = Damage(*(part.to(model.device) for part in found))
        fits[name] = (_fit_experts if modules[name].mod_part == "expert" else _fit)(found)
        # Routers have no bias: a fit's constant is part of its threshold, beside the logarithm of what skipping saves.
        logit[name] = math.log(saved[name] * len(found.decided) / int(found.decided.sum()))
        scores = ((found.hidden.float() @ fit.weight.T)[found.decided] + fit.bias for fit in fits[name])
        above[name] = [score - logit[name] for score in scores]
        damage[name] = found.mean()
    # One for all routers: the deviance of a single one is heavy-tailed and would choose by chance.
    best = min(range(len(RIDGES)), key=lambda ridge: sum(found[ridge].deviance for found in fits.values()))
    middle = float(curve_of([part[best] for part in above.values()], [saved[name] for name in above], _HALF))
    for name, found in fits.items():
        logit[name] += middle - found[best].bias
        with torch.no_grad():
            router_of(modules[name]).weight.copy_(found[best].weight)
    return Start(logit, damage, RIDGES[best])


def _fit(found: Damage) -> list[RouterFit]:
    """Weights ``[1, d]``, by ridge."""
    return [fit._replace(weight=fit.weight[None]) for fit in fit_router(found.hidden, found.damage[:, 0])]


def _fit_experts(found: Damage) -> list[RouterFit]:
    """Weights ``[E, d]`` and their common constant, by ridge: what an expert's own adds goes along the mean input."""
    common, mean = math.log(max(found.mean(), 1e-12)), found.hidden.float().mean(0)
    enough = [expert for expert, count in enumerate(found.decided.sum(0).tolist()) if count >= _FEWEST]
    chosen = [found.decided[:, expert] for expert in enough]
    own = [fit_router(found.hidden[c], found.damage[c, expert]) for expert, c in zip(enough, chosen, strict=True)]
    fits = []
    for place in range(len(RIDGES)):
        of_ridge, weight = [each[place] for each in own], mean.new_zeros(found.decided.shape[1], len(mean))
        for expert, fit in zip(enough, of_ridge, strict=True):
            weight[expert] = fit.weight + (fit.bias - common) * mean / mean.square().sum()
        fits.append(RouterFit(weight, common, sum(fit.deviance for fit in of_ridge) / max(len(own), 1)))
    return fits


@torch.no_grad()
def within_limits(model: nn.Module, logit: Mapping[str, float]) -> dict[str, float]:
    """Scale routers and their threshold logits alike until σ has room for all of these; they decide as before."""
    modules = routed_modules(model)
    scale = min(1.0, _LIMIT / max(1.0, *(abs(value) for value in logit.values())))
    for name in logit:
        router_of(modules[name]).weight.mul_(scale)
    return {name: scale * value for name, value in logit.items()}


@torch.no_grad()
def fit_router(hidden: Tensor, damage: Tensor) -> list[RouterFit]:
    """Gamma regressions with a logarithmic link of ``damage [n]`` on ``hidden [n, d]``, one with each of the ridges.

    Fisher scoring with the curvature at the start, damped and stopped early; then slope and constant are fitted anew
    on the first fifth of the tokens, left out before, so that what does not generalise is shrunk.

    Raises:
        UserError: for too few to fit on.
    """
    held = int(len(hidden) * _HELD_OUT)
    if held < 2:
        raise UserError(f"{len(hidden)} decisions are too few to fit a router on: train on more rows, or label more "
                        "of them (--max_train_samples, --label_tokens)")  # fmt: skip
    centre = hidden[held:].float().mean(0)
    damage = damage.clamp(max=_CAP)
    unseen, x = hidden[:held].float() - centre, hidden[held:].float() - centre
    covariance = x.T @ x / len(x)
    seen = Seen(centre, covariance, float(covariance.diagonal().mean()))
    return [_fitted(unseen, damage[:held], x, damage[held:], seen, ridge) for ridge in RIDGES]


def _fitted(unseen: Tensor, unseen_damage: Tensor, x: Tensor, damage: Tensor, seen: Seen, ridge: float) -> RouterFit:
    factor = seen.factor(ridge)
    weight, bias = torch.zeros_like(seen.mean), damage.mean().clamp(min=1e-12).log()
    for rate in _STEPS:
        excess = _excess(damage, x @ weight + bias)
        bias = bias + rate * excess.mean()
        weight = weight + rate * torch.cholesky_solve((x.T @ (excess - excess.mean()) / len(x))[:, None], factor)[:, 0]
    z = unseen @ weight
    middle, spread = z.mean(), z.var().clamp(min=1e-12)
    z, bias, slope = z - middle, bias + middle, torch.ones_like(bias)
    for _ in range(60):
        excess = _excess(unseen_damage, slope * z + bias)
        bias = bias + 0.3 * excess.mean()
        slope = (slope + 0.3 * (excess * z).mean() / spread).clamp(*_SLOPES)
    z = slope * z + bias
    deviance = (_excess(unseen_damage, z) + z).mean()
    weight = slope * weight
    return RouterFit(weight, float(bias - slope * middle - seen.mean @ weight), float(deviance))


def _excess(damage: Tensor, z: Tensor) -> Tensor:
    """How far damages exceed ``exp(z)``, in units of it."""
    return (damage * torch.exp(-z)).clamp(max=_CLIP) - 1
