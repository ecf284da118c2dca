"""Keys and values of tokens whose attention is skipped: the projection alone (design: ``kv_policy="keep"``)."""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional


def missing_seam(attention: nn.Module) -> str | None:
    """The attribute that :func:`project_kv` needs and ``attention`` lacks, or None."""
    if not hasattr(attention, "head_dim"):
        return "head_dim"
    if not hasattr(attention, "qkv_proj"):
        for name in ("k_proj", "v_proj"):
            if not hasattr(attention, name):
                return name
    if _rotary(attention) is None:
        return "apply_rotary_pos_emb"
    return None


def project_kv(
    attention: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values as ``attention`` itself would cache them.

    Args:
        attention: an attention module of transformers (separate or fused projections, optional key norm, rotary).
        hidden: ``[b, t, d]``, its input. position_embeddings: cos and sin, ``[b or 1, t, rotary_dim]``.

    Returns:
        keys and values, each ``[b, kv_heads, t, head_dim]``.
    """
    keys, values = _project(attention, hidden)
    norm = getattr(attention, "k_norm", None) or getattr(attention, "k_layernorm", None)
    # OLMo-2 and OLMoE normalise the flat key, the others head by head.
    flat = norm is not None and norm.weight.dim() == 1 and norm.weight.numel() == keys.shape[-1]
    if flat:
        keys = norm(keys)
    clip = getattr(getattr(attention, "config", None), "clip_qkv", None)
    if clip is not None:
        keys, values = keys.clamp(-clip, clip), values.clamp(-clip, clip)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys, values = keys.view(shape), values.view(shape)
    if norm is not None and not flat:
        keys = norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if not getattr(attention, "use_rope", True):
        return keys, values
    rotary, width = _rotary(attention), getattr(attention, "rotary_ndims", None)
    if width is None:
        return rotary(keys[:, :0], keys, *position_embeddings)[1], values
    turned = rotary(keys[:, :0, :, :width], keys[..., :width], *position_embeddings)[1]
    return torch.cat([turned, keys[..., width:]], dim=-1), values


def _project(attention: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    if not hasattr(attention, "qkv_proj"):
        return attention.k_proj(hidden), attention.v_proj(hidden)
    fused, config = attention.qkv_proj, attention.config
    start = config.num_attention_heads * attention.head_dim
    width = config.num_key_value_heads * attention.head_dim
    if type(fused) is nn.Linear:
        bias = None if fused.bias is None else fused.bias[start:]
        keys_values = functional.linear(hidden, fused.weight[start:], bias)
    else:  # an adapter or a quantised layer: its weight cannot be sliced
        keys_values = fused(hidden)[..., start:]
    return keys_values[..., :width], keys_values[..., width:]


def _rotary(attention: nn.Module):
    return _rotary_of(type(attention))


@functools.cache
def _rotary_of(attention: type):
    """The rotary function that the family's own modeling file uses."""
    for cls in attention.__mro__:
        found = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if found is not None:
            return found
    return None
