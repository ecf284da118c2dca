"""Decoder layers: carry the pass to routed children through recomputation, and route the layer as a whole."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .context import RoutingContext, current_context, routing_context
from .routed import Routed
from .routed_attention import RoutedAttending


class CarriesContext:
    """A decoder layer that hands the pass to what gradient checkpointing runs again.

    That is in the backward pass, in another thread and after the model's own forward has ended. transformers sets and
    calls the checkpointing function as an attribute of each layer; there, and at no cost elsewhere, the pass is bound.
    """

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        checkpoint, context = vars(self).get("_gradient_checkpointing_func"), current_context()
        if checkpoint is None:
            raise AttributeError("_gradient_checkpointing_func")
        return lambda run, *args: checkpoint(functools.partial(_within, context, run), *args)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, checkpoint: Callable[..., Any]) -> None:
        vars(self)["_gradient_checkpointing_func"] = checkpoint


def _within(context: RoutingContext | None, run: Callable[..., Any], *args: Any) -> Any:
    with routing_context(context):
        return run(*args)


class RoutedLayer(CarriesContext):
    """A decoder layer with routed children."""

    def __init_subclass__(cls, **kwargs) -> None:
        """Nothing: the layer's own class has wrapped its forward for checkpointing, and once is enough."""


class RoutedBlock(CarriesContext, RoutedAttending):
    """A decoder layer that runs for kept sequences or tokens only; to skipped ones it adds its skip path at most."""

    mod_part = "block"

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """``x + m·F(x) + (1−m)·P(h)`` for ``hidden_states [b, t, d]``."""
        return self.mod_forward(hidden_states, kwargs)

    def mod_run(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return super(Routed, self).forward(hidden_states, **kwargs)

    def mod_features(self, hidden_states: Tensor) -> Tensor:
        norm = getattr(self, "input_layernorm", None)
        return hidden_states if norm is None else norm(hidden_states)

    def mod_residual(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def mod_attention(self):
        return self.self_attn
