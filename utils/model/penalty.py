"""The regulariser in anyone's loop: ``λ · Σ_layers ReLU(capacity_l − target)`` (paper equation 6).

``λ`` and ``target`` are ``mod_gradient_scale`` and ``mod_target_capacity`` of the model's configuration. As with the
library's own auxiliary losses, a forward in training that gets labels adds the term to ``loss`` and gives the bare
penalty as ``mod_penalty``. Where the loss is computed outside the model (a fused head, label smoothing, one's own)
nobody would add it: a backward pass that meets the term in no loss gets its gradient at the decoder's output.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .recording import RoutingLog, routed_base


class _Term:
    """The penalty of one training pass, and what it got from backward passes that met it in a loss."""

    penalty: Tensor

    def __init__(self) -> None:
        self.met: list[Tensor] = []


_LAST: weakref.WeakKeyDictionary[nn.Module, weakref.ref[_Term]] = weakref.WeakKeyDictionary()


def capacity_penalty(model: nn.Module) -> Tensor:
    """``Σ_layers ReLU(capacity_l − target)`` of the model's last forward in training, 0-d and differentiable.

    For losses of one's own: multiply it by λ and add it. With a ``mod_gradient_scale`` of the configuration other than
    zero that is done already wherever it can be, so leave that at zero. It is valid as long as the pass's graph is
    alive: until its outputs, and all that was computed from them, are gone.

    Raises:
        ValueError: if no such pass is alive.
    """
    term = _LAST.get(routed_base(model), lambda: None)()
    if term is None:
        raise ValueError("no penalty: there is no forward pass of this model in training whose outputs are alive")
    return term.penalty


def join_penalty(decoder: nn.Module, outputs: Any, log: RoutingLog) -> Any:
    """The outputs of a decoder in training, with the penalty of what ``log`` recorded behind the last hidden state."""
    if not log.records:
        return outputs
    hidden = outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state
    term, penalty = _Term(), log.penalty(decoder.config.mod_target_capacity).to(hidden.device)
    # One of the micro-batches of a step stands for all where the loss does not say how they weigh: the last.
    scale = decoder.config.mod_gradient_scale if _ends_a_step() else 0.0
    hidden = _Joined.apply(hidden, penalty, scale, term)
    # Made after the node above, and hence met before it by a backward pass.
    term.penalty = penalty.view_as(penalty)
    if term.penalty.requires_grad:
        term.penalty.register_hook(term.met.append)
    _LAST[decoder] = weakref.ref(term)
    if isinstance(outputs, tuple):
        return (hidden, *outputs[1:])
    outputs.last_hidden_state = hidden
    return outputs


class _Joined(torch.autograd.Function):
    """Hidden states as they are; backwards, the gradient of ``scale · penalty`` unless a loss brought it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, penalty: Tensor, scale: float, term: _Term) -> Tensor:
        ctx.term, ctx.weight = term, penalty.new_full((), scale)
        half = torch.is_autocast_enabled(hidden.device.type) and torch.get_autocast_dtype(hidden.device.type)
        ctx.scaled = torch.float16 in (hidden.dtype, half)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.term.met or not ctx.weight:
            return gradient, None, None, None
        if ctx.scaled:
            raise ValueError(
                "float16: losses are scaled before the backward pass, and by how much the model cannot know; train in "
                "bfloat16, or set mod_gradient_scale to 0 and add capacity_penalty(model) to your loss"
            )
        return gradient, ctx.weight, None, None


def _ends_a_step() -> bool:
    """Whether the optimizer steps after this pass, as far as accelerate (the Trainer's engine) has been told."""
    accelerate = sys.modules.get("accelerate.state")
    return accelerate is None or accelerate.GradientState().sync_gradients


def with_penalty(outputs: Any, model: nn.Module, weight: Tensor | float, labelled: bool) -> Any:
    """Outputs of a causal LM in training with the term in ``loss``, where labels gave one, and as ``mod_penalty``."""
    term = _LAST.get(model, lambda: None)()
    if term is None:
        return outputs
    scale = model.config.mod_gradient_scale
    if isinstance(outputs, tuple):
        loss = outputs[0] + (scale * weight * term.penalty).to(outputs[0].device) if labelled and scale else outputs[0]
        return (loss, *outputs[1:])
    if scale and outputs.get("loss") is not None:
        outputs["loss"] = outputs["loss"] + (scale * weight * term.penalty).to(outputs["loss"].device)
    return _extended(type(outputs))(**outputs, mod_penalty=term.penalty)


@functools.cache
def _extended(outputs: type) -> type:
    """A class of model outputs with one more field."""
    return dataclasses.make_dataclass(outputs.__name__, [("mod_penalty", Tensor | None, None)], bases=(outputs,))
