"""Gates in front of routed modules: what routers see and decide in a pass, and what the loss says of each decision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from router_tuning.model import routed_modules
from router_tuning.model.context import current_context
from router_tuning.model.routed import Routed
from router_tuning.model.router import ModRouter
from router_tuning.model.routing import run_decoder

SLOPE = 0.25
"""Of the score σ(z) at z = 0, through which the engine hands on the gradient of a decision."""
_EVEN = 1e-6


@dataclass
class Gate:
    """What one router saw and decided in a pass; ``n`` is ``b`` at sequence level, else ``b·t``.

    Attributes:
        hidden: ``[n, d]``, what it saw. score: ``W·h + b`` in float32, ``[n, E]``, with ``E`` 1 but for experts.
        leaf: ``n·E`` values on which the decisions hang, whose gradient is that of ``m`` times :data:`SLOPE`.
        decided: bool ``[n, E]``, where the router has a say: not on padding, not on tokens that always run, and on
            none but the experts that the model's own gate chose.
    """

    hidden: Tensor
    score: Tensor
    leaf: Tensor
    decided: Tensor

    def where(self, matters: Tensor) -> Tensor:
        """Decisions ``[n, E]`` at tokens where ``matters [b, t]``, or of sequences which have such a token."""
        whole = matters.any(1) if len(self.score) == len(matters) else matters.flatten()
        return self.decided & whole.to(self.decided.device)[:, None]

    def by_row(self, values: Tensor) -> Tensor:
        """``values [b]`` of sequences as ``[n, 1]``."""
        return values.to(self.score.device).repeat_interleave(len(self.score) // len(values))[:, None]

    def gradient(self, of_leaf: Tensor) -> Tensor:
        """The gradient of ``m``, ``[n, E]`` in float32, from that of the leaf."""
        return of_leaf.float().view_as(self.score) / SLOPE


class Seen(NamedTuple):
    """What a router sees: its ``mean [d]``, ``covariance [d, d]`` and the mean ``variance`` of an element.

    Routers of experts share one threshold by layer, so their weights carry the constant, too: the mean is zero then,
    and the covariance is ``E[h hᵀ]``.
    """

    mean: Tensor
    covariance: Tensor
    variance: float

    def factor(self, ridge: float) -> Tensor:
        """The Cholesky factor ``[d, d]`` of the covariance with ``ridge`` mean variances on its diagonal."""
        ridged = self.covariance.clone()
        ridged.diagonal().add_(ridge * self.variance)
        return torch.linalg.cholesky(ridged)


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``[b, t]`` that predict one which carries loss, and those before or at the last of these."""
    predicts = labels.roll(-1, dims=1) != -100
    predicts[:, -1] = False
    return predicts, predicts.flip(1).cummax(1).values.flip(1)


def router_of(module: Routed) -> ModRouter:
    """The router that decides; under peft the copy that is trained and saved."""
    return [router for router in module.mod_router.modules() if isinstance(router, ModRouter)][-1]


@contextmanager
def gates(
    modules: Mapping[str, Routed], bias: Mapping[str, float], threshold: Tensor | None
) -> Iterator[dict[str, Gate]]:
    """Inside the block routers decide by ``W·h + b ≥ threshold`` of each row, through gates without a past.

    Args:
        threshold: ``[b]``; None: everything runs.
    """
    found: dict[str, Gate] = {}
    before = {name: module.mod_logit for name, module in modules.items()}
    chosen: dict[str, Tensor] = {}

    def choice(name: str) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            chosen[name] = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]

        return see

    def hook(name: str, module: Routed) -> Callable[..., Tensor]:
        def see(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            score = (output.detach() + bias[name]).flatten(0, -2)
            gate = Gate(args[0].detach().flatten(0, -2), score, score, _decided(module, score))
            if name in chosen:
                gate.decided &= torch.zeros_like(gate.decided).scatter_(1, chosen[name], True)
            runs = torch.ones_like(gate.decided) if threshold is None else score >= gate.by_row(threshold)
            leaf = torch.where(runs, 0.0, -_EVEN).view_as(output).to(output.dtype)
            gate.leaf = leaf.requires_grad_(torch.is_grad_enabled())
            found[name] = gate
            return gate.leaf

        return see

    handles = [module.mod_router.register_forward_hook(hook(name, module)) for name, module in modules.items()]
    handles += [
        module.register_forward_pre_hook(choice(name), with_kwargs=True)
        for name, module in modules.items()
        if module.mod_part == "expert"
    ]
    try:
        for module in modules.values():
            module.mod_logit = -_EVEN / 2
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.mod_logit = before[name]


def _decided(module: Routed, score: Tensor) -> Tensor:
    """Bool ``[n, E]``: real tokens or sequences, without first tokens that run whatever the router says."""
    context, everything = current_context(), torch.ones_like(score, dtype=torch.bool)
    if module.mod_level == "sequence":
        return everything if context.decided is None else everything & context.decided.to(score.device)[:, None]
    first = module.mod_first(context)
    for mask in (context.real, None if first is None else ~first):
        if mask is not None:
            everything &= mask.to(score.device).flatten()[:, None]
    return everything


@torch.no_grad()
def inputs_seen(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], bias: Mapping[str, float]
) -> tuple[dict[str, Seen], dict[str, Tensor]]:
    """What routers see of ``batches`` while everything runs, and the scores of their decisions, ``[n]``."""
    modules = routed_modules(model)
    sums: dict[str, list[Tensor | int]] = {}
    scores: dict[str, list[Tensor]] = {name: [] for name in modules}
    for batch in batches:
        with gates(modules, bias, None) as found:
            run_decoder(model, batch)
        for name, gate in found.items():
            scores[name].append(gate.score[gate.decided].cpu())
            hidden = gate.hidden[gate.decided.any(1)].float()
            new = [hidden.sum(0), hidden.T @ hidden, len(hidden)]
            sums[name] = new if name not in sums else [a + b for a, b in zip(sums[name], new, strict=True)]
    seen = {name: _seen(*sums[name], centred=module.mod_part != "expert") for name, module in modules.items()}
    return seen, {name: torch.cat(parts) for name, parts in scores.items()}


def _seen(first: Tensor, second: Tensor, count: int, centred: bool) -> Seen:
    mean, square = first / count, second / count
    variance = float((square.diagonal() - mean.square()).mean())
    if not centred:
        mean = torch.zeros_like(mean)
    return Seen(mean, square - mean[:, None] * mean, variance)


def curve_of(scores: Sequence[Tensor], saved: Sequence[float], grid: Tensor) -> Tensor:
    """Thresholds at which the shares of ``grid`` of the routed operations run, on the CPU.

    Args:
        scores: ``[n]`` by router, of any number. saved: operations that never running each would save.
    """
    values, order = torch.cat([part.flatten() for part in scores]).sort()
    parts = zip(scores, saved, strict=True)
    each = [torch.full((part.numel(),), share / (sum(saved) * max(part.numel(), 1))) for part, share in parts]
    weight = torch.cat(each).to(values.device)[order].double().cumsum(0)
    return values[torch.searchsorted(weight, (1 - grid).to(weight)).clamp(max=len(values) - 1)].cpu()
