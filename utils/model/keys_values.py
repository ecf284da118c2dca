"""Keys and values of tokens whose attention is skipped: the projection alone (design: ``kv_policy="keep"``)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional


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
    traits = _traits_of(attention)
    keys, values = _project(attention, hidden, traits.fused)
    norm = None if traits.norm is None else getattr(attention, traits.norm)
    if traits.normed_flat:
        keys = norm(keys)
    if traits.clip is not None:
        keys, values = keys.clamp(-traits.clip, traits.clip), values.clamp(-traits.clip, traits.clip)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys, values = keys.view(shape), values.view(shape)
    if norm is not None and not traits.normed_flat:
        keys = norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if not traits.rotates:
        return keys, values
    width = traits.rotary_width
    rotate = traits.family.apply_rotary_pos_emb  # looked up anew: other libraries put a faster one there
    if width is None:
        return rotate(keys[:, :0], keys, *position_embeddings)[1], values
    turned = rotate(keys[:, :0, :, :width], keys[..., :width], *position_embeddings)[1]
    return torch.cat([turned, keys[..., width:]], dim=-1), values


class _Traits(NamedTuple):
    """What a family's attention does to keys: fixed by its code and config, and slow to ask for at every token.

    ``norm`` names its norm of keys, which is ``normed_flat`` over all heads at once (OLMo-2, OLMoE) or head by head;
    ``family`` is the modeling file that holds its rotation.
    """

    fused: bool
    norm: str | None
    normed_flat: bool
    clip: float | None
    rotates: bool
    family: ModuleType
    rotary_width: int | None


def _traits_of(attention: nn.Module) -> _Traits:
    traits = _TRAITS.get(attention)
    if traits is None:
        norms = [name for name in ("k_norm", "k_layernorm") if getattr(attention, name, None) is not None]
        weight = getattr(attention, norms[0]).weight if norms else None
        family = _family_of(type(attention))
        if family is None:
            raise ValueError(f"{type(attention).__name__} has no apply_rotary_pos_emb beside it")
        traits = _Traits(
            fused=hasattr(attention, "qkv_proj"),
            norm=norms[0] if norms else None,
            normed_flat=weight is not None and weight.dim() == 1 and weight.numel() != attention.head_dim,
            clip=getattr(getattr(attention, "config", None), "clip_qkv", None),
            rotates=bool(getattr(attention, "use_rope", True)),
            family=family,
            rotary_width=getattr(attention, "rotary_ndims", None),
        )
        _TRAITS[attention] = traits
    return traits


_TRAITS: WeakKeyDictionary[nn.Module, _Traits] = WeakKeyDictionary()


def _project(attention: nn.Module, hidden: Tensor, is_fused: bool) -> tuple[Tensor, Tensor]:
    if not is_fused:
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


def _family_of(attention: type) -> ModuleType | None:
    """The modeling file that has the family's rotary function."""
    files = (sys.modules.get(cls.__module__) for cls in attention.__mro__)
    return next((file for file in files if hasattr(file, "apply_rotary_pos_emb")), None)
