"""Thresholds of routers while they train: for any budget a quantile of the scores, under biases that learn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from router_tuning.model import routed_modules
from router_tuning.model.router import ModRouter


class _BiasedRouter(ModRouter):
    """``z = W·h + b``; ``b [outputs]`` is a parameter like ``W`` to every engine and in checkpoints."""

    bias: nn.Parameter

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits in float32."""
        return super().forward(hidden) + self.bias.float()


@contextmanager
def biased(model: nn.Module, biases: Mapping[str, float]) -> Iterator[None]:
    """Inside the block the routers that train have a bias; behind it they decide as before without one.

    Args:
        biases: to start from, by router; routers that are not named get none.
    """
    routers = {name: router for name, router in routers_that_train(model).items() if name in biases}
    for name, router in routers.items():
        value = torch.full((router.weight.shape[0],), biases[name], device=router.weight.device)
        router.__class__, router.bias = _BiasedRouter, nn.Parameter(value)
    try:
        yield
    finally:
        for router in routers.values():
            router.__class__ = ModRouter
            del router.bias


def routers_that_train(model: nn.Module) -> dict[str, ModRouter]:
    """Routers by name; under peft the copy of each that trains."""
    return {
        name: router
        for name, module in routed_modules(model).items()
        for router in module.mod_router.modules()
        if isinstance(router, ModRouter) and router.weight.requires_grad
    }


def share_threshold(logits: Sequence[Tensor], share: float, weights: Sequence[float] | None = None) -> Tensor:
    """The value that ``share`` of the logits reaches, 0-d, on the device (no host sync).

    Args:
        logits: by router. weights: of a router, however many logits it has; default: alike.
    """
    device = logits[0].device
    weights = [1.0] * len(logits) if weights is None else weights
    values, order = torch.cat([part.to(device) for part in logits]).sort(descending=True)
    each = [
        torch.full((len(part),), weight / (len(part) * sum(weights)), device=device)
        for part, weight in zip(logits, weights, strict=True)
    ]
    above = (torch.cat(each)[order].double().cumsum(0) <= share).sum()
    return values[above.clamp(min=1) - 1]
