"""Stand-ins for the cache while packed queries run: which keys they see, and what reaches the cache itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .packing import Packing, key_mask, query_mask


class AllKeys:
    """Keys and values of all tokens: those that packed queries bring, merged with those of the skipped tokens.

    Args:
        cache: the real cache or None. shape: ``(b, t)``. packing: of the tokens that run.
        skipped: int64 ``[n]``, flat indices ``row·t + position``. keys, values: theirs, ``[heads, n, head_dim]``.
    """

    def __init__(
        self, cache, shape: torch.Size, packing: Packing, skipped: Tensor, keys: Tensor, values: Tensor
    ) -> None:
        self.cache, self.shape, self.packing = cache, shape, packing
        self.states = []
        for states in (keys, values):
            heads, _, width = states.shape
            everything = states.new_empty(shape.numel(), heads * width)
            everything.index_copy_(0, skipped, states.transpose(0, 1).flatten(1))
            self.states.append(everything.view(*shape, heads, width))

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> list[Tensor]:
        """Called by the module with ``[r, heads, q, head_dim]`` of the packed tokens; returns what they attend to."""
        packing, rows = self.packing, self.packing.row_list
        for everything, packed in zip(self.states, (keys, values), strict=True):
            # Filler slots hold skipped tokens, whose keys come out the same: no need to leave them out.
            packed = packed.transpose(1, 2).flatten(0, 1).flatten(1)
            everything.view(self.shape.numel(), -1).index_copy_(0, packing.flat, packed)
        states = [everything.transpose(1, 2) for everything in self.states]
        if self.cache is not None:
            states = self.cache.update(*states, layer, *args, **kwargs)
        if len(rows) == self.shape[0]:
            return states
        adjacent = rows[-1] - rows[0] + 1 == len(rows)
        return [s[rows[0] : rows[-1] + 1] if adjacent else s[packing.rows] for s in states]


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
