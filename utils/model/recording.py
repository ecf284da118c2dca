"""Looking at decisions, and imposing them: ``record_routing`` and ``force_routing``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .context import Forced, RouterKey
from .router import straight_through


@dataclass
class Record:
    """One decision: ``keep`` bool ``[b]``, ``[b, t]`` or (experts) ``[n, k]``; ``logits`` alike or None if forced."""

    keep: Tensor
    logits: Tensor | None
    real: Tensor | None

    def capacity(self) -> Tensor:
        """Executed share of real rows or tokens, a 0-d float32 tensor that carries the straight-through gradient."""
        executed = self.keep.float()
        if self.logits is not None and self.logits.requires_grad:
            executed = executed + straight_through(self.logits)
        if self.real is None:
            return executed.mean()
        return (executed * self.real).sum() / self.real.sum().clamp(min=1)


class RoutingLog:
    """Decisions of the forward passes inside a ``record_routing`` block.

    Keys are layer indices, or ``(layer, part)`` where a granularity combines several parts. A sequence-level decision
    that a cache holds is logged once, in the pass that took it.
    """

    def __init__(self) -> None:
        self.records: dict[RouterKey, list[Record]] = {}

    def add(self, key: RouterKey, keep: Tensor, logits: Tensor | None, real: Tensor | None) -> None:
        """Called by the routed modules."""
        self.records.setdefault(key, []).append(Record(keep, logits, real))

    @property
    def decisions(self) -> dict[RouterKey, Tensor]:
        """Bool ``[b]`` of the last pass (sequence), or ``[b, t]`` of all passes joined along the tokens (token)."""
        return {key: _joined([r.keep for r in records]) for key, records in self.records.items()}

    @property
    def scores(self) -> dict[RouterKey, Tensor]:
        """``σ(W·h)``, shaped as :attr:`decisions`; routers whose decision was forced have none."""
        return {
            key: torch.sigmoid(_joined([r.logits.detach() for r in records]))
            for key, records in self.records.items()
            if all(r.logits is not None for r in records)
        }

    def capacity_tensors(self) -> dict[RouterKey, Tensor]:
        """Executed share per router as detached 0-d tensors (no host sync), averaged over the recorded passes."""
        with torch.no_grad():
            return {key: _mean_capacity(records) for key, records in self.records.items()}

    def capacity(self) -> dict[RouterKey | str, float]:
        """Executed share per router, and their mean as ``"total"``."""
        shares = {key: float(value) for key, value in self.capacity_tensors().items()}
        return {"total": sum(shares.values()) / len(shares) if shares else 1.0, **shares}

    def penalty(self, target: float) -> Tensor:
        """``Σ_layers ReLU(capacity_l − target)`` (paper equation 6), differentiable; multiply by λ yourself."""
        if not self.records:
            raise ValueError("no routing was recorded: run a forward pass of a routed model inside record_routing")
        capacities = [_mean_capacity(records) for records in self.records.values()]
        return torch.stack([torch.relu(c - target).to(capacities[0].device) for c in capacities]).sum()


def _mean_capacity(records: list[Record]) -> Tensor:
    """Over all passes, weighted by the real rows or tokens in each."""
    if len(records) == 1:
        return records[0].capacity()
    sizes = torch.stack(
        [torch.tensor(float(r.keep.numel())) if r.real is None else r.real.sum().float().cpu() for r in records]
    )
    shares = torch.stack([r.capacity().cpu() for r in records])
    return (shares * sizes).sum() / sizes.sum().clamp(min=1)


def _joined(tensors: list[Tensor]) -> Tensor:
    if tensors[0].dim() == 1 or len({t.shape[0] for t in tensors}) > 1:
        return tensors[-1]
    return torch.cat(tensors, dim=1)


def routed_base(model: nn.Module) -> nn.Module:
    """The routed decoder inside ``model`` (a causal LM, a peft or accelerate wrapper around one, or itself)."""
    for module in model.modules():
        if getattr(module, "is_routed_decoder", False):
            return module
    raise ValueError("this model is not routed: call route(model, …) or load a routed checkpoint first")


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingLog]:
    """Log the decisions of every forward pass of ``model`` inside the block (blocks may be nested)."""
    base, log = routed_base(model), RoutingLog()
    base.mod_logs = [*base.mod_logs, log]
    try:
        yield log
    finally:
        base.mod_logs = [other for other in base.mod_logs if other is not log]


@contextmanager
def force_routing(model: nn.Module, keep: Forced) -> Iterator[None]:
    """Impose decisions inside the block: for benchmarks, controls and tests.

    Args:
        keep: True or False for all; ``{layer or (layer, part): bool or bool tensor [b] or [b, t]}``, layers that are
            not named decide for themselves; or a callable ``(layer, part, shape, past) -> bool | tensor | None``.

    Raises:
        ValueError: for a name that no router has; in the forward pass, for a mask that is not bool or does not fit.
    """
    base = routed_base(model)
    if isinstance(keep, Mapping):
        config = base.mod_config
        odd = [key for key in keep if key not in {*config.layers, *config.targets}]
        if odd:
            routed = ", ".join(f"{part} of layers {config.layers_of(part)}" for part in config.parts)
            raise ValueError(f"forced mask names no router: {odd[0]!r}; routed are {routed}")
    imposed = (keep,)  # blocks of several threads may end in any order
    base.mod_forced = [*base.mod_forced, imposed]
    try:
        yield
    finally:
        base.mod_forced = [other for other in base.mod_forced if other is not imposed]
