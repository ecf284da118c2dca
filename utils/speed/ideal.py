"""The ideal that skipping is held to: the dense model itself without the work that is skipped.

It is measured in place, on a copy of the dense model that lacks the routed modules, or whose attention only projects
keys and values (the part that ``kv_policy="keep"`` cannot skip).
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from router_tuning.model import ModConfig
from router_tuning.model.keys_values import project_kv


class _NoUpdate(nn.Module):
    """A module that was cut out: no update, no work."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, *args, hidden_states: Tensor | None = None, **kwargs):
        zero = (args[0] if hidden_states is None else hidden_states).new_zeros(())
        return (zero, None) if self.pair else zero


class _KeysOnly(nn.Module):
    """Attention that fills the cache and does nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, position_embeddings, past_key_values=None, **kwargs):
        states = project_kv(self.attention, hidden_states, position_embeddings)
        if past_key_values is not None:
            past_key_values.update(*states, self.attention.layer_idx)
        return hidden_states.new_zeros(()), None


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own modules and the same weights."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def reduced(dense: PreTrainedModel, routing: ModConfig) -> PreTrainedModel:
    """The dense model without the modules that ``routing`` names, or with what ``keep`` leaves of them."""
    model = shared_copy(dense)
    for index, part in routing.targets:
        layer, keys_only = model.model.layers[index], routing.kv_policy == "keep" and routing.parts[part] == "token"
        if part in ("attn", "block"):
            layer.self_attn = _KeysOnly(layer.self_attn) if keys_only else _NoUpdate(pair=True)
        if part in ("mlp", "block"):
            layer.mlp = _NoUpdate(pair=False)
    return model
