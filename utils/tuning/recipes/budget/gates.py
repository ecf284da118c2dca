"""Gates in front of routed modules: what routers see and decide in a pass, and what the loss says of each decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from router_tuning.model import routed_modules
from router_tuning.model.context import current_context
from router_tuning.model.routing import run_decoder
from router_tuning.tuning.recipes.budget.closed_form import RIDGE

SLOPE = 0.25
"""Of the score σ(z) at z = 0, through which the engine hands on the gradient of a decision."""
_EVEN = 1e-6


class Seen(NamedTuple):
    """What a router sees: ``mean [d]``, and the Cholesky ``factor [d, d]`` of its ridged covariance."""

    mean: Tensor
    factor: Tensor


class Gates:
    """What one pass has left: inputs and scores of all routers, and the gates that their decisions hang on."""

    def __init__(self, names: Sequence[str]) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.names = names
        self.decided: Tensor | None = None

    def hidden(self) -> list[Tensor]:
        """What each router saw, ``[b, t, d]``."""
        return [self.seen[name][0] for name in self.names]

    def scores(self) -> Tensor:
        """``W·h + b`` in float32, ``[R, b, t]``."""
        return torch.stack([self.seen[name][1] for name in self.names])

    def leaves(self) -> list[Tensor]:
        """Gates ``[b, t, 1]`` whose gradients are those of ``m``, times the slope of σ at zero."""
        return [self.seen[name][2] for name in self.names]


@contextmanager
def gates(modules: Mapping[str, Any], bias: Mapping[str, float], threshold: Tensor | None) -> Iterator[Gates]:
    """Inside the block routers decide by ``W·h + b ≥ threshold`` of each row, through gates without a past.

    Args:
        threshold: ``[b]``; None: everything runs.
    """
    found, before = Gates(list(modules)), {name: module.mod_logit for name, module in modules.items()}

    def hook(name: str, module: Any) -> Callable[..., Tensor]:
        def see(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            score, context = output.detach()[..., 0] + bias[name], current_context()
            real = torch.ones_like(score, dtype=torch.bool) if context.real is None else context.real
            first = module.mod_first(context)
            found.decided = real if first is None else real & ~first
            runs = torch.ones_like(real) if threshold is None else score >= threshold[:, None]
            leaf = torch.where(runs, 0.0, -_EVEN)[..., None].to(output.dtype).requires_grad_(threshold is not None)
            found.seen[name] = args[0].detach(), score, leaf
            return leaf

        return see

    handles = [module.mod_router.register_forward_hook(hook(name, module)) for name, module in modules.items()]
    try:
        for module in modules.values():
            module.mod_logit = -_EVEN / 2
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.mod_logit = before[name]


@torch.no_grad()
def inputs_seen(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], bias: Mapping[str, float]
) -> tuple[dict[str, Seen], Tensor]:
    """What routers see of the real tokens of ``batches`` while everything runs, and their scores ``[R, n]``."""
    modules = routed_modules(model)
    sums, scores, count = {}, [], 0
    with gates(modules, bias, None) as found:
        for batch in batches:
            run_decoder(model, batch)
            count += int(found.decided.sum())
            scores.append(found.scores()[:, found.decided].cpu())
            for name, hidden in zip(modules, found.hidden(), strict=True):
                seen = hidden[found.decided].float()
                new = [seen.sum(0), seen.T @ seen]
                sums[name] = new if name not in sums else [a + b for a, b in zip(sums[name], new, strict=True)]
    return {n: _seen(first / count, second / count) for n, (first, second) in sums.items()}, torch.cat(scores, 1)


def _seen(mean: Tensor, square: Tensor) -> Seen:
    covariance = square - mean[:, None] * mean
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return Seen(mean, torch.linalg.cholesky(covariance))
