"""Keys and values of tokens whose attention is skipped: the projection alone (design: ``kv_policy="keep"``)."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

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
    traits = _traits_of(attention)
    norm = None if traits.norm is None else getattr(attention, traits.norm)
    # OLMo-2 and OLMoE normalise the flat key, the others head by head.
    flat = norm is not None and norm.weight.dim() == 1 and norm.weight.numel() == keys.shape[-1]
    if flat:
        keys = norm(keys)
    if traits.clip is not None:
        keys, values = keys.clamp(-traits.clip, traits.clip), values.clamp(-traits.clip, traits.clip)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys, values = keys.view(shape), values.view(shape)
    if norm is not None and not flat:
        keys = norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if not traits.rotates:
        return keys, values
    width = traits.rotary_width
    if width is None:
        return traits.rotary(keys[:, :0], keys, *position_embeddings)[1], values
    turned = traits.rotary(keys[:, :0, :, :width], keys[..., :width], *position_embeddings)[1]
    return torch.cat([turned, keys[..., width:]], dim=-1), values


class _Traits(NamedTuple):
    """What a family's attention does to keys: fixed by its code and config, and slow to ask for at every token."""

    norm: str | None
    clip: float | None
    rotates: bool
    rotary: Callable[..., tuple[Tensor, Tensor]]
    rotary_width: int | None


def _traits_of(attention: nn.Module) -> _Traits:
    traits = _TRAITS.get(attention)
    if traits is None:
        norms = [name for name in ("k_norm", "k_layernorm") if getattr(attention, name, None) is not None]
        clip = getattr(getattr(attention, "config", None), "clip_qkv", None)
        width, rotates = getattr(attention, "rotary_ndims", None), getattr(attention, "use_rope", True)
        traits = _Traits(norms[0] if norms else None, clip, bool(rotates), _rotary(attention), width)
        _TRAITS[attention] = traits
    return traits


_TRAITS: WeakKeyDictionary[nn.Module, _Traits] = WeakKeyDictionary()


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
