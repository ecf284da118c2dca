"""Skip paths in closed form: reduced-rank ridge regression of a module's output on its input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_mod import ModConfig
from .context import RoutingContext
from .installing import skip_path
from .recording import force_routing, routed_base
from .routed import Routed
from .routing import routed_modules, run_decoder

RIDGE = 1e-2
_MOMENT_BYTES = 2**31
"""Moments of as many modules as fit here are gathered in one pass: all 64 of a 32-layer model at width 2,048."""


class Moments:
    """Sums over tokens from which the best affine map of ``h`` to ``F(h)`` follows, ``2·d²`` numbers in float32.

    Everything is counted from the first batch's mean: activations with a large mean would lose their variance.
    """

    def __init__(self) -> None:
        self.count = 0

    def add(self, hidden: Tensor, update: Tensor) -> None:
        """Take in ``hidden`` and ``update``, both ``[n, d]``."""
        both = torch.stack([hidden, update]).float()
        if self.count == 0 and both.shape[1]:
            self.origin = both.mean(1, keepdim=True)
            self.sums = torch.zeros_like(self.origin[:, 0])
            self.products = self.sums.new_zeros(2, hidden.shape[1], hidden.shape[1])  # of h·hᵀ and h·F(h)ᵀ
            self.square = self.sums.new_zeros(())
        if both.shape[1]:
            both -= self.origin
            self.count += both.shape[1]
            self.sums += both.sum(1)
            self.products += both[0].T @ both
            self.square += both[1].square().sum()

    def solve(self, rank: int) -> tuple[dict[str, Tensor], float]:
        """``down``, ``up`` (of ``rank`` 0: neither) and ``bias`` in float32, and the share of variance explained."""
        means = self.sums.double() / self.count
        variance = float(self.square / self.count - means[1].square().sum())
        bias = self.origin[:, 0].double() + means
        if rank == 0:
            return {"bias": bias[1].float()}, 0.0
        covariance, cross = self.products.double() / self.count - means[0][:, None] * means[:, None]
        covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
        full = torch.linalg.solve(covariance, cross)  # A, [d, d]
        # Right singular vectors of C^{1/2}·A are eigenvectors of Aᵀ·C·A, and that is the cross-covariance times A.
        explained, vectors = torch.linalg.eigh(cross.T @ full)
        up = vectors[:, -rank:].T
        down = full @ up.T
        share = float(explained[-rank:].clamp(min=0).sum()) / max(variance, 1e-30)
        weights = {"down": down, "up": up, "bias": bias[1] - bias[0] @ down @ up}
        return {name: value.float().contiguous() for name, value in weights.items()}, share


@torch.no_grad()
def fit_skip_paths(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], kind: str = "low_rank", rank: int = 32
) -> dict[str, float]:
    """Give every routed module the skip path that is closest to its output, in place and in closed form.

    ``P`` minimises the squared error over the real tokens of ``batches`` but the first of each sequence (which always
    runs), under a ridge of 1e-2 of the mean variance of ``h``. A few thousand tokens do. One pass without a
    gradient reads moments of ``2·d²`` float32 numbers per module; where those of all modules exceed 2 GB (from a
    width of 4,096 with 16 modules on), there are as many passes as it takes.

    Args:
        model: routed; what its skip paths were before does not matter.
        batches: inputs of the model's forward.
        kind: ``low_rank``, ``mean``, or ``zero``, which takes the paths away. rank: of ``low_rank``.

    Returns:
        The share of the variance of each module's output that its path explains, by ``"<layer>.<part>"``.

    Raises:
        ValueError: for a bad ``kind`` or ``rank``, or batches that hold no token to fit on.
    """
    decoder, modules = routed_base(model), routed_modules(model)
    _install(model, decoder, modules, kind, rank)
    wanted = {name: module for name, module in modules.items() if module.mod_skip is not None}
    shares: dict[str, float] = {}
    for group in _groups(wanted, decoder.config.hidden_size):
        gathered = _gather(decoder, batches, group)
        for name, module in group.items():
            moments, width = gathered[name], 0 if kind == "mean" else rank
            if moments.count <= 2 * width:
                raise ValueError(f"{moments.count} tokens are too few to fit skip paths of rank {width} on")
            weights, shares[name] = moments.solve(width)
            for parameter, value in weights.items():
                getattr(module.mod_skip, parameter).copy_(value)
    return shares


def _install(model: nn.Module, decoder: nn.Module, modules: Mapping[str, Routed], kind: str, rank: int) -> None:
    """New paths at zero, and the config that says so."""
    rank = rank if kind == "low_rank" else decoder.mod_config.skip_rank
    config = ModConfig(**{**vars(decoder.mod_config), "skip": kind, "skip_rank": rank})
    for module in modules.values():
        module.mod_skip = skip_path(module, module.mod_part, config, decoder.config.hidden_size)
    decoder.mod_config.skip, decoder.mod_config.skip_rank = kind, rank
    decoder.mod_config.write_to(getattr(model, "config", decoder.config))


def _groups(modules: Mapping[str, Routed], width: int) -> Iterable[dict[str, Routed]]:
    at_once = max(1, _MOMENT_BYTES // (8 * width * width))
    names = list(modules)
    for start in range(0, len(names), at_once):
        yield {name: modules[name] for name in names[start : start + at_once]}


def _gather(decoder: nn.Module, batches, group: Mapping[str, Routed]) -> dict[str, Moments]:
    names = {id(module): name for name, module in group.items()}
    moments = {name: Moments() for name in group}

    def observe(module: Routed, features: Tensor, update: Tensor, keep: Tensor, context: RoutingContext) -> None:
        if id(module) in names:
            chosen = ~context.first if context.real is None else context.real & ~context.first
            chosen = chosen.to(features.device)
            moments[names[id(module)]].add(features[chosen], update[chosen])

    decoder.mod_observer = observe
    try:
        with force_routing(decoder, True):
            for batch in batches:
                run_decoder(decoder, batch)
    finally:
        decoder.mod_observer = None
    return moments
