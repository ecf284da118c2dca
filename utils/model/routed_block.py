"""Decoder layers: carry the pass to routed children through recomputation, and route the layer as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .call import RoutingCall, current_call, routing_call
from .routed import Routed
from .routed_attention import RoutedAttending


class CarriesCall:
    """A decoder layer that takes the pass along.

    Gradient checkpointing runs ``forward`` again in the backward pass, in another thread and after the model's own
    forward has ended: in training the pass therefore travels as an argument, not as state.
    """

    def __call__(self, *args, **kwargs):
        """Hand the current pass to ``forward`` where it may run again."""
        call = current_call()
        if call is not None and call.training:
            kwargs["routing"] = call
        return super().__call__(*args, **kwargs)


class RoutedLayer(CarriesCall):
    """A decoder layer with routed children."""

    def forward(self, hidden_states: Tensor, *args, routing: RoutingCall | None = None, **kwargs) -> Tensor:
        """The layer, ``[b, t, d] → [b, t, d]``."""
        if routing is None:
            return super().forward(hidden_states, *args, **kwargs)
        with routing_call(routing):
            return super().forward(hidden_states, *args, **kwargs)


class RoutedBlock(CarriesCall, RoutedAttending):
    """A decoder layer that runs for kept sequences or tokens only; skipped ones pass through unchanged."""

    mod_part = "block"

    def forward(self, hidden_states: Tensor, *, routing: RoutingCall | None = None, **kwargs) -> Tensor:
        """``x + m·F(x)`` for ``hidden_states [b, t, d]``."""
        if routing is None:
            return self.mod_forward(hidden_states, kwargs)
        with routing_call(routing):
            return self.mod_forward(hidden_states, kwargs)

    def mod_run(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return super(Routed, self).forward(hidden_states, **kwargs)

    def mod_features(self, hidden_states: Tensor) -> Tensor:
        norm = getattr(self, "input_layernorm", None)
        return hidden_states if norm is None else norm(hidden_states)

    def mod_residual(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.clone()

    def mod_attention(self):
        return self.self_attn
