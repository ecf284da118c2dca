"""Keys and values beside packed queries: those of skipped tokens, and stand-ins for the cache: who sees what."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from .packing import Packing, key_mask, query_mask


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


class MergedKeys:
    """Keys and values of all tokens: those of the skipped ones, merged with those that the packed queries bring.

    Args:
        cache: the real cache or None. packing: of the tokens that run. shape: ``(b, t)``.
        skipped: int64 ``[n]``, flat indices ``row·t + position``. keys, values: theirs, ``[heads, n, head_dim]``.
        all_rows: whether those of rows without a packed query are given back, too.

    Attributes:
        merged: what was given back last, each ``[rows, heads, k, head_dim]``.
    """

    def __init__(
        self, cache, packing: Packing, shape: torch.Size, skipped: Tensor, keys: Tensor, values: Tensor, all_rows: bool
    ) -> None:
        self.cache, self.packing, self.shape, self.all_rows, self.flat = cache, packing, shape, all_rows, []
        for states in (keys, values):
            heads, _, width = states.shape
            everything = states.new_empty(shape.numel(), heads * width)
            self.flat.append(everything.index_copy_(0, skipped, states.transpose(0, 1).flatten(1)))

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> Sequence[Tensor]:
        """Called by the module with ``[r, heads, q, head_dim]`` of the packed tokens; returns what they attend to."""
        merged = []
        for everything, packed in zip(self.flat, (keys, values), strict=True):
            # Filler slots hold skipped tokens, whose keys come out the same: no need to leave them out.
            everything.index_copy_(0, self.packing.flat, packed.transpose(1, 2).flatten(0, 1).flatten(1))
            merged.append(everything.view(*self.shape, -1, packed.shape[-1]).transpose(1, 2))
        if self.cache is not None:
            merged = self.cache.update(*merged, layer, *args, **kwargs)
        rows = self.packing.row_list
        if not self.all_rows and len(rows) < self.shape[0]:
            adjacent = rows[-1] - rows[0] + 1 == len(rows)
            merged = [s[rows[0] : rows[-1] + 1] if adjacent else s[self.packing.rows] for s in merged]
        self.merged = merged
        return merged


class AllButStored:
    """Keys and values of a first pass, all of which take part; the cache stores those of kept rows or tokens.

    Args:
        cache: the real cache. keep: bool ``[b]`` or ``[b, t]``. tokens: length of the pass.
    """

    def __init__(self, cache, keep: Tensor, tokens: int) -> None:
        self.cache, self.keep, self.tokens = cache, keep, tokens

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Called by the module with ``[b, heads, t, head_dim]``, and gives them back."""
        stored = self.cache.layers[layer]
        if self.keep.dim() == 2:
            stored.mod_open_rows(len(self.keep), self.keep.device)
            for row, kept in enumerate(self.keep):
                stored.mod_append(row, keys[row][:, kept], values[row][:, kept], kept.nonzero()[:, 0])
            stored.mod_advance(self.tokens)
            stored.mod_trim()
            return keys, values
        stored.mod_store(self.keep)
        if self.keep.any():
            self.cache.update(keys[self.keep], values[self.keep], layer, *args, **kwargs)
        else:
            stored.mod_advance(self.tokens)
        return keys, values


class KeptKeys:
    """Keys and values of executed tokens only: those of this pass, after those that their rows have stored.

    Args:
        layer: the ragged cache layer, or None without a cache. past: tokens that the cache has seen.
    """

    def __init__(self, layer, past: int) -> None:
        self.layer, self.past = layer, past
        self.packing: Packing | None = None
        self.with_past = False
        self.stale: dict[int, int] = {}

    def open(self, packing: Packing, mask: Tensor | None, tokens: int) -> Tensor | None:
        """Expect these queries; returns their mask ``[r, 1, q, keys]`` over stored and new keys (None: causal).

        Args:
            mask: the module's mask over logical keys, or None for causal attention. tokens: length of this pass.
        """
        self.packing = packing
        index = [row[:count] + self.past for row, count in zip(packing.index, packing.counts, strict=True)]
        if self.layer is not None and self.past:
            self.stale = {row: self.layer.mod_stale(row) for row in packing.row_list}
            stored = [self.layer.mod_index[row][self.stale[row] :] for row in packing.row_list]
            self.with_past = any(row.numel() for row in stored)
            index = [torch.cat(pair) for pair in zip(stored, index, strict=True)]
        ragged = len({row.numel() for row in index}) > 1
        if mask is None and ((tokens == 1 and not ragged) or (tokens > 1 and not self.with_past)):
            return None
        key_index = pad_sequence(index, batch_first=True, padding_value=-1)
        offset = 0 if mask is None else self.past + tokens - mask.shape[-1]
        columns = torch.where(key_index >= 0, key_index - offset, -1)
        queries = None if mask is None else query_mask(mask, packing, mask.shape[-1], tokens)
        return key_mask(queries, columns, key_index >= 0, packing.index + self.past)

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Called by the module with ``[r, heads, q, head_dim]`` of the packed tokens; returns what they attend to."""
        packing, layer = self.packing, self.layer
        if layer is None:
            return keys, values
        for slot, (row, count) in enumerate(zip(packing.row_list, packing.counts, strict=True)):
            index = packing.index[slot, :count] + self.past
            layer.mod_append(row, keys[slot, :, :count], values[slot, :, :count], index)
        if not self.with_past:
            return keys, values
        both = (
            [states[row][:, self.stale[row] :] for row in packing.row_list]
            for states in (layer.mod_keys, layer.mod_values)
        )
        if len(packing.row_list) == 1:
            return tuple(rows[0][None] for rows in both)
        return tuple(
            pad_sequence([states.transpose(0, 1) for states in rows], batch_first=True).transpose(1, 2)
            for rows in both
        )
