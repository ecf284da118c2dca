"""Training routers in coordinates in which what they see has unit covariance.

The straight-through gradient moves a weight along ``E[benefit · h]``. Where features are correlated (those of a
residual stream are, strongly) that is not the direction that tells benefits apart; ``Cov⁻¹ E[benefit · h]`` is. Going
half of the way, ``A = Cov^(-1/4)``, did best: figures/experiments/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from router_tuning.model import routed_modules
from router_tuning.model.router import ModRouter

_FLOOR = 1e-2  # of the mean eigenvalue: directions of less variance are not blown up further


class _WhitenedRouter(ModRouter):
    """A router whose parameter is ``V`` of ``W = V·A``."""

    root: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of ``W``, in float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float() @ self.root)


@contextmanager
def whitened(model: nn.Module, roots: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block the routers' parameters, and what checkpoints hold of them, are ``V``; afterwards ``W`` again.

    Every engine steps them as it steps any parameter. Routers decide the same before and after either change.

    Args:
        roots: ``A [d, d]`` by router, from :func:`inverse_roots`.
    """
    for router, root in _routers(model, roots):
        router.__class__, router.root = _WhitenedRouter, root
        _change(router.weight, torch.linalg.inv(root.double()))
    try:
        yield
    finally:
        for router, root in _routers(model, roots):
            _change(router.weight, root.double())
            router.__class__ = ModRouter
            del router.root


def _routers(model: nn.Module, roots: Mapping[str, Tensor]) -> Iterator[tuple[ModRouter, Tensor]]:
    """Routers that train (under peft a copy of each does), with their coordinates."""
    for name, module in routed_modules(model).items():
        for router in module.mod_router.modules():
            if isinstance(router, ModRouter) and router.weight.requires_grad:
                yield router, roots[name]


@torch.no_grad()
def _change(weight: Tensor, matrix: Tensor) -> None:
    # Shards are cut along outputs, the coordinates are along features.
    here = weight.to_local() if isinstance(weight, DTensor) else weight
    here.copy_(here.double() @ matrix.to(here.device))


@torch.no_grad()
def inverse_roots(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], share: float = 1.0
) -> dict[str, Tensor]:
    """``Cov^(-share/2) [d, d]`` by router, of what it sees of the real tokens of ``batches`` while everything runs."""
    modules, sums, seen = routed_modules(model), {}, {}

    def see(name: str):
        def hook(_: nn.Module, args: tuple) -> None:
            hidden = args[0].reshape(-1, args[0].shape[-1])[seen["real"]].double()
            total = [hidden.sum(0), hidden.T @ hidden]
            sums[name] = total if name not in sums else [a + b for a, b in zip(sums[name], total, strict=True)]

        return hook

    handles = [module.mod_router.register_forward_pre_hook(see(name)) for name, module in modules.items()]
    before = {name: module.mod_logit for name, module in modules.items()}
    training, count = model.training, 0.0
    device = next(model.parameters()).device
    model.eval()
    try:
        for module in modules.values():
            module.mod_logit = -float("inf")
        for batch in batches:
            batch = {key: value.to(device) for key, value in batch.items()}
            seen["real"] = batch["attention_mask"].bool().flatten()
            count += float(seen["real"].sum())
            model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.mod_logit = before[name]
        model.train(training)
    return {name: _inverse_root(first / count, second / count, share) for name, (first, second) in sums.items()}


def _inverse_root(mean: Tensor, square: Tensor, share: float) -> Tensor:
    value, vector = torch.linalg.eigh(square - mean[:, None] * mean)
    value = value.clamp(min=_FLOOR * float(value.mean()))
    return ((vector / value ** (share / 2)) @ vector.T).float()
