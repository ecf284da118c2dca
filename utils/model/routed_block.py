"""Decoder layers that are routed as a whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .routed import Routed
from .routed_attention import RoutedAttending


class RoutedBlock(RoutedAttending):
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
