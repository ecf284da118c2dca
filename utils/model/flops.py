"""Floating-point operations of a routed decoder: what each module costs, and the share that a budget leaves.

Counted are matrix products, two operations per multiply-add, per token at a reference context length; a query meets
the keys that causality and its window let it see. The decoder is all of its layers; embeddings and the output matrix
stay out, as do norms and the routers themselves, one column beside hundreds.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PretrainedConfig

from .recording import routed_base
from .routed import Routed
from .routing import routed_modules

TOKENS = 512
"""Reference context length."""


def decoder_flops(model: nn.Module, tokens: int = TOKENS) -> float:
    """Operations per token of all decoder layers when everything runs."""
    decoder = routed_base(model)
    return sum(_operations(layer, decoder.config, tokens) for layer in decoder.layers)


def flops_share(model: nn.Module, capacity: float | Mapping[str, float], tokens: int = TOKENS) -> float:
    """Share of the decoder's operations that is left where each module runs for a share of rows or tokens.

    Args:
        capacity: one share for all routed modules, or one by ``"<layer>.<part>"``, first tokens counted.
        tokens: context length for which keys, and a sequence's first token, are counted.
    """
    saved = saved_shares(model, tokens)
    if not isinstance(capacity, Mapping):
        capacity = dict.fromkeys(saved, capacity)
    return 1.0 - sum((1.0 - capacity[name]) * share for name, share in saved.items())


def saved_shares(model: nn.Module, tokens: int = TOKENS) -> dict[str, float]:
    """What never running a module would save, as a share of the decoder's operations, by ``"<layer>.<part>"``.

    A skipped module still costs its skip path; its keys and values, at token level under ``kv_policy="keep"``; and at
    sequence level with a skip path the first token. Under ``drop`` the keys that kept tokens miss are not taken off.
    """
    config, total = routed_base(model).config, decoder_flops(model, tokens)
    return {
        name: (_operations(module, config, tokens) - _left(module, config, tokens)) / total
        for name, module in routed_modules(model).items()
    }


def _left(module: Routed, config: PretrainedConfig, tokens: int) -> float:
    """Operations per token of a module that is skipped."""
    left = 0.0
    if module.mod_skip is not None:
        left += sum(2.0 * p.numel() for p in module.mod_skip.parameters() if p.dim() == 2)
        if module.mod_level == "sequence":
            left += _operations(module, config, 1) / tokens
    if module.mod_level == "token" and module.mod_kv_policy == "keep" and module.mod_part in ("attn", "block"):
        attention = module if module.mod_part == "attn" else module.self_attn
        left += 2.0 * 2 * config.hidden_size * config.num_key_value_heads * attention.head_dim
    return left


def _operations(module: nn.Module, config: PretrainedConfig, tokens: int) -> float:
    """Per token: products with the weights inside ``module``, and attention over the keys of ``tokens`` tokens."""
    total = 0.0
    for child in module.modules():
        if hasattr(child, "in_features") and hasattr(child, "out_features"):
            if next(child.children(), None) is None:  # an adapter around a linear layer counts as its parts
                total += 2.0 * child.in_features * child.out_features
        elif not hasattr(child, "mod_reset"):
            for weight in child.parameters(recurse=False):
                if weight.dim() > 1:  # stacked experts, [experts, out, in], count as often as a token meets one
                    active = config.num_experts_per_tok / len(weight) if weight.dim() == 3 else 1.0
                    total += 2.0 * weight.numel() * active
        if hasattr(child, "head_dim") and hasattr(child, "layer_idx"):
            total += 2.0 * 2 * config.num_attention_heads * child.head_dim * _keys(child, config, tokens)
    return total


def _keys(attention: nn.Module, config: PretrainedConfig, tokens: int) -> float:
    """How many keys a query meets on average."""
    types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if window is None or (types is not None and types[attention.layer_idx] != "sliding_attention"):
        window = tokens
    return sum(min(number, window) for number in range(1, tokens + 1)) / tokens
