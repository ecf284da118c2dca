"""Cache layers that hold keys and values of executed rows (or tokens) only, and the decisions of their sequences.

A routed model swaps the class of a dynamic cache layer for :class:`RowCacheLayer` or :class:`RaggedCacheLayer` when
the cache first passes through it. To ``generate()`` both look like the layer they were: lengths and mask sizes are
logical, i.e. they count skipped tokens too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .class_swap import mixed


class HeldDecisions(CacheLayerMixin):
    """Sequence-level decisions of one layer, ``{part: bool [b]}``, which follow the rows of the batch."""

    mod_decisions: dict[str, Tensor]
    mod_blank: Tensor | None
    mod_length: int

    @classmethod
    def mod_names(cls, plain: type[CacheLayerMixin]) -> dict[str, Any]:
        """``RowCacheLayerOfDynamicLayer``, which is no layer type of a configuration."""
        return {"__name__": f"{cls.__name__}Of{plain.__name__}", "_layer_type": None}

    def mod_adopt(self) -> None:
        """Start from the (empty) plain layer that this object was."""
        self._clear()

    def mod_hold(self, part: str, keep: Tensor, blank: Tensor | None = None) -> None:
        """Hold the decision ``keep [b]`` of a part for the life of this cache; rows that are ``blank`` still wait."""
        self.mod_decisions[part], self.mod_blank = keep, blank
        self._kept_rows.pop(part, None)

    def mod_kept_rows(self, part: str) -> Tensor:
        """Indices of the rows that execute a part; computed once, so that decoding needs no host sync for it."""
        if part not in self._kept_rows:
            self._kept_rows[part] = self.mod_decisions[part].nonzero().flatten()
        return self._kept_rows[part]

    def _clear(self) -> None:
        self.mod_decisions, self.mod_blank, self._kept_rows, self.mod_length = {}, None, {}, 0

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, stored or not."""
        return self.mod_length

    def mod_advance(self, tokens: int) -> None:
        """Count ``tokens`` that no row stored."""
        self.mod_length += tokens
        if hasattr(self, "cumulative_length"):
            self.cumulative_length += tokens

    def reset(self) -> None:
        """Forget keys, values, length and decisions."""
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row ``i`` becomes the former row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        rows = self.mod_batch_size()
        if rows is not None:
            self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (positions or a bool mask), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self.mod_select_storage(indices)
        self.mod_decisions = {part: keep[indices.to(keep.device)] for part, keep in self.mod_decisions.items()}
        self.mod_blank = None if self.mod_blank is None else self.mod_blank[indices.to(self.mod_blank.device)]
        self._kept_rows = {}

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (transformers' convention: zero or negative)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative int, not {tokens_to_remove}")
        removed = min(-tokens_to_remove, self.mod_length)
        self.mod_crop_storage(removed)
        self.mod_length -= removed
        if self.mod_length == 0:
            self._clear()


class RowCacheLayer(HeldDecisions):
    """Stores the rows whose sequence executes this layer, ``[rows kept, heads, tokens, head_dim]``.

    ``mod_rows`` is the bool ``[b]`` that says which; None while every row is stored (the plain layer's behaviour).
    """

    mod_rows: Tensor | None = None

    def mod_adopt(self) -> None:
        super().mod_adopt()
        self.mod_rows = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append the kept rows' keys and values, ``[rows kept, heads, t, head_dim]``."""
        self.mod_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.mod_rows = None

    def mod_store(self, keep: Tensor) -> None:
        """Store the rows ``keep [b]``, some of those stored so far."""
        if self.mod_rows is not None and self.keys is not None and self.keys.numel() > 0:
            stay = keep[self.mod_rows].to(self.keys.device)
            self.keys, self.values = self.keys[stay], self.values[stay]
        self.mod_rows = keep

    def mod_batch_size(self) -> int | None:
        if self.mod_rows is not None:
            return len(self.mod_rows)
        for keep in self.mod_decisions.values():
            return len(keep)
        return None if self.keys is None else self.keys.shape[0]

    def mod_select_storage(self, indices: Tensor) -> None:
        stored = indices
        if self.mod_rows is not None:
            indices = indices.to(self.mod_rows.device)
            slot = self.mod_rows.cumsum(0) - 1
            kept = self.mod_rows[indices]
            stored, self.mod_rows = slot[indices][kept], kept
        if self.keys is not None and self.keys.numel() > 0:
            self.keys = self.keys[stored.to(self.keys.device)]
            self.values = self.values[stored.to(self.values.device)]

    def mod_crop_storage(self, removed: int) -> None:
        if self.is_initialized and self.keys.numel() > 0:
            super(HeldDecisions, self).crop(-removed)
        elif hasattr(self, "cumulative_length"):
            self.cumulative_length -= removed
        if removed == self.mod_length:  # the next pass decides anew, and may store other rows
            self.mod_rows = None
            if self.is_initialized:
                self.keys, self.values = self.keys.new_empty(0), self.values.new_empty(0)


class RaggedCacheLayer(HeldDecisions):
    """Stores, per row, the keys and values of executed tokens only (token level, ``kv_policy="drop"``).

    ``mod_keys[r]`` and ``mod_values[r]`` are ``[heads, n_r, head_dim]``; ``mod_index[r]`` is the logical position of
    each stored token, int64 ``[n_r]``.
    """

    mod_keys: list[Tensor]
    mod_values: list[Tensor]
    mod_index: list[Tensor]

    def mod_adopt(self) -> None:
        super().mod_adopt()
        self.mod_keys, self.mod_values, self.mod_index = [], [], []

    def update(self, *args, **kwargs) -> tuple[Tensor, Tensor]:
        raise RuntimeError("a ragged cache layer takes its keys and values through mod_append")

    def mod_append(self, row: int, keys: Tensor, values: Tensor, index: Tensor) -> None:
        """Store executed tokens of one row: keys, values ``[heads, n, head_dim]``, index ``[n]``."""
        if self.mod_index[row].numel():
            self.mod_keys[row] = torch.cat([self.mod_keys[row], keys], dim=1)
            self.mod_values[row] = torch.cat([self.mod_values[row], values], dim=1)
            self.mod_index[row] = torch.cat([self.mod_index[row], index])
        else:  # a clone, or the slice would keep the whole padded batch alive
            self.mod_keys[row], self.mod_values[row], self.mod_index[row] = keys.clone(), values.clone(), index

    def mod_stale(self, row: int) -> int:
        """How many stored tokens of a row have left the sliding window: none, unless the past is recorded."""
        window = getattr(self, "sliding_window", None)
        if window is None or not self.record_past:
            return 0
        return int((self.mod_index[row] < self.mod_length - window + 1).sum())

    def mod_open_rows(self, rows: int, device: torch.device) -> None:
        """Make room for ``rows`` rows at the first pass."""
        if not self.mod_index:
            self.mod_keys, self.mod_values = [None] * rows, [None] * rows
            self.mod_index = [torch.empty(0, dtype=torch.long, device=device)] * rows

    def mod_trim(self) -> None:
        """Forget what has left the sliding window, as the plain layer does."""
        window = getattr(self, "sliding_window", None)
        if window is None or getattr(self, "record_past", False):
            return
        oldest = self.mod_length - window + 1
        if oldest > 0:
            self._filter(lambda index: index >= oldest)

    def reset(self) -> None:
        super().reset()
        self.mod_keys, self.mod_values, self.mod_index = [], [], []

    def mod_batch_size(self) -> int | None:
        return len(self.mod_index) or None

    def mod_select_storage(self, indices: Tensor) -> None:
        if self.mod_index:
            rows = indices.tolist()
            self.mod_keys = [self.mod_keys[r] for r in rows]
            self.mod_values = [self.mod_values[r] for r in rows]
            self.mod_index = [self.mod_index[r] for r in rows]

    def mod_crop_storage(self, removed: int) -> None:
        length = self.mod_length - removed
        window = getattr(self, "sliding_window", None)
        if window is not None:
            if removed and self.mod_length >= window and not getattr(self, "record_past", False):
                raise RuntimeError("cannot crop past the sliding window: call activate_past_recording before")
            self.cumulative_length -= removed
        self._filter(lambda index: (index < length) & (index >= (0 if window is None else length - window + 1)))

    def _filter(self, wanted) -> None:
        for row, index in enumerate(self.mod_index):
            keep = wanted(index)
            if index.numel() and not bool(keep.all()):
                self.mod_keys[row] = self.mod_keys[row][:, keep]
                self.mod_values[row] = self.mod_values[row][:, keep]
                self.mod_index[row] = index[keep]


def adopt_layers(cache: Any, plan: Mapping[int, type[HeldDecisions] | None]) -> None:
    """Make layers of the cache routed ones; swaps their class at the first call.

    Args:
        plan: what each becomes; None leaves it plain and only checks it.

    Raises:
        ValueError: for a cache whose layers are not the dynamic ones, or that another routing (or none) has filled.
    """
    if not plan or getattr(cache, "mod_adopted", None) == plan:
        return
    deepest = max(plan)
    if not isinstance(cache, Cache):
        raise ValueError(f"past_key_values must be a DynamicCache, not a {type(cache).__name__}")
    while len(cache.layers) <= deepest and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) <= deepest:
        raise ValueError(f"layer {deepest}: this cache has {len(cache.layers)} layers; make one for this model")
    for index, stored in enumerate(cache.layers):
        wanted = plan.get(index)
        if isinstance(stored, HeldDecisions) and (wanted is None or not isinstance(stored, wanted)):
            if stored.get_seq_length() > 0:
                raise ValueError(
                    f"layer {index}: this cache was filled under another routing; start from an empty one"
                )
            stored.__class__ = stored.mod_mixture[1]
    for index, mixin in plan.items():
        _adopt(cache.layers[index], index, mixin)
    cache.mod_adopted = dict(plan)  # decoding asks at every token


def _adopt(stored: Any, index: int, mixin: type[HeldDecisions] | None) -> None:
    if isinstance(stored, HeldDecisions):
        return
    plain = type(stored)
    if plain not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise ValueError(
            f"layer {index}: a routed model needs a DynamicCache, not layers of type {plain.__name__}; "
            "leave cache_implementation unset or pass past_key_values=DynamicCache(config=model.config)"
        )
    if mixin is None:
        return
    if stored.get_seq_length() > 0:
        raise ValueError(f"layer {index}: this cache was filled without routing; start from an empty one")
    stored.__class__ = mixed(mixin, plain)
    stored.mod_adopt()


def kv_cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values really held by ``cache``: each storage counted once, skipped rows and tokens not."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += getattr(layer, "mod_keys", []) + getattr(layer, "mod_values", [])
        for tensor in held:
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
