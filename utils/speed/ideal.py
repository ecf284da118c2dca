"""The ideal that skipping is held to: the dense model itself without the work that is skipped.

It is measured in place, on a copy of the dense model that lacks the routed modules, or whose attention only projects
keys and values (the part that ``kv_policy="keep"`` cannot skip).
"""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.model import ModConfig
from router_tuning.model.keys_values import project_kv


def shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with its own modules and the same weights."""
    memo = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, memo)


def reduced(dense: PreTrainedModel, routing: ModConfig) -> PreTrainedModel:
    """The dense model without the modules that ``routing`` names, or with what ``keep`` leaves of them."""
    model = shared_copy(dense)
    for index, part in routing.targets:
        layer, keys_only = model.model.layers[index], routing.kv_policy == "keep" and routing.parts[part] == "token"
        if part in ("mlp", "block"):
            layer.mlp.forward = lambda hidden_states: hidden_states.new_zeros(())
        if part in ("attn", "block"):

            def attend(hidden_states: Tensor, position_embeddings, past_key_values=None, own=layer.self_attn,
                       keys_only=keys_only, **_):  # fmt: skip
                states = project_kv(own, hidden_states, position_embeddings) if keys_only else None
                if keys_only and past_key_values is not None:
                    past_key_values.update(*states, own.layer_idx)
                return hidden_states.new_zeros(()), None

            layer.self_attn.forward = attend
    return model
