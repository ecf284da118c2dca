"""Attention and whole blocks: rows or tokens that are skipped cost no attention and, unless kept, no key and value.

Both are the same mechanism (paper section 3.2): the module runs on what is kept and the rest of its output is the
skip path ``P(h)``, zero in the published method; a decoder layer adds it to its input.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .context import RoutingContext
from .keys_values import AllButStored, KeptKeys, MergedKeys, project_kv
from .packed_attention import ChunkedMask, SpreadQueries, any_shape
from .packing import (
    Packing,
    check_packable,
    evened,
    flat_positions,
    pack,
    query_mask,
    select_rows,
    select_tokens,
    singles,
    true_places,
)
from .routed import Routed, row_counts


class RoutedAttention(Routed):
    """An attention module that runs for kept sequences or tokens only; skipped ones get the skip path, if any."""

    mod_part = "attn"

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        """``m·Attn(h) + (1−m)·P(h)`` for ``hidden_states [b, t, d]``; attention weights are not returned."""
        return self.mod_forward(hidden_states, kwargs), None

    def mod_run(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The module itself, ``[r, q, d] → [r, q, d]``."""
        return super(Routed, self).forward(hidden_states=hidden_states, **kwargs)[0]

    def mod_features(self, hidden_states: Tensor) -> Tensor:
        """Input of the router, and of the attention's projections."""
        return hidden_states

    def mod_residual(self, hidden_states: Tensor) -> Tensor | None:
        """The residual stream, where the module's output contains it."""
        return None

    def mod_attention(self):
        """The attention module."""
        return self

    def mod_forward(self, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The routed module, ``[b, t, d] → [b, t, d]``."""
        context = self.mod_context()
        if self.mod_level == "token":
            kwargs = self._with_mask(hidden_states, kwargs, context)
        features = self.mod_features(hidden_states)
        decision = self.mod_decide(features, context)
        keep = decision.keep
        offers_all = self.mod_level == "token" and self.mod_kv_policy == "keep"
        if self.mod_runs_all(decision, context, whole=offers_all or context.cache is None or context.past == 0):
            output = self._run_all(hidden_states, keep, kwargs, None if offers_all else context.cache)
            return self.mod_merge(decision, features, output, context, self.mod_residual(hidden_states))
        if self.mod_level == "sequence":
            return self.mod_unlearnt(self._run_rows(hidden_states, features, keep, kwargs, context), context)
        counts = row_counts(keep, context.real)
        if offers_all:
            if counts is None:
                return self.mod_run(hidden_states, kwargs)
            if any(counts) and self.mod_runs_for_some(keep):
                ran = self.mod_run(hidden_states, kwargs)
                return self.mod_merge(decision, features, ran, context, self.mod_residual(hidden_states))
            return self._run_tokens(hidden_states, features, keep, counts, kwargs)
        return self.mod_unlearnt(self._run_ragged(hidden_states, features, keep, counts, kwargs, context), context)

    def _run_all(self, hidden_states: Tensor, keep: Tensor, kwargs: dict, cache: Any) -> Tensor:
        """Everything, for the gradient of the router; what is kept sees, and ``cache`` stores, as if alone."""
        if self.mod_level == "token" and self.mod_kv_policy == "drop":
            kwargs = {**kwargs, "attention_mask": self._mask_skipped_keys(keep, hidden_states, kwargs)}
        if cache is not None:
            kwargs = {**kwargs, "past_key_values": AllButStored(cache, keep, hidden_states.shape[1])}
        return self.mod_run(hidden_states, kwargs)

    def _run_rows(
        self, hidden_states: Tensor, features: Tensor, keep: Tensor, kwargs: dict, context: RoutingContext
    ) -> Tensor:
        batch, tokens = hidden_states.shape[:2]
        layer = None if context.cache is None else context.cache.layers[self.mod_layer]
        if layer is not None and context.decides:
            layer.mod_store(keep)
        rows = self.mod_kept_rows(keep, context)
        if rows.shape[0] == batch:
            return self.mod_run(hidden_states, kwargs)
        ran = None
        if rows.shape[0]:
            with any_shape(keep.device):
                ran = self.mod_run(hidden_states.index_select(0, rows), select_rows(kwargs, rows, batch))
        elif layer is not None:
            layer.mod_advance(tokens)
        skipped = true_places(~keep, batch - rows.shape[0]) if tokens > 1 else None
        output = self.mod_skipped(features, self.mod_residual(hidden_states), skipped)
        if ran is not None:
            output.index_copy_(0, rows, ran.to(output.dtype))
        first = self.mod_first(context)
        if first is not None:
            # A row is skipped by a decision, and that is taken in the pass that brings its first token.
            count = batch - rows.shape[0] if context.past == 0 else None
            self._run_first(hidden_states, output, first & ~keep[:, None], count, kwargs)
        return output

    def _run_first(
        self, hidden_states: Tensor, output: Tensor, alone: Tensor, count: int | None, kwargs: dict
    ) -> None:
        """Where ``alone [b, t]``, write into ``output``: each token as a sequence of its own that leaves no key.

        Args:
            count: how many there are, where that is known.
        """
        flat = alone.flatten().nonzero()[:, 0] if count is None else true_places(alone, count)
        if flat.shape[0]:
            packing = singles(flat, alone.shape[1])
            inputs = {**select_tokens(kwargs, packing), "attention_mask": None, "past_key_values": None}
            packing.put_(self.mod_run(packing.take(hidden_states), inputs), output)

    def _run_tokens(
        self, hidden_states: Tensor, features: Tensor, keep: Tensor, counts: list[int], kwargs: dict
    ) -> Tensor:
        """Queries of kept tokens, keys and values of all."""
        attention, cache = self.mod_attention(), kwargs.get("past_key_values")
        if not any(counts):
            if cache is not None:
                cache.update(*project_kv(attention, features, kwargs["position_embeddings"]), self.mod_layer)
            return self.mod_skipped(features, self.mod_residual(hidden_states))
        check_packable(attention, self.mod_layer)
        packing = pack(keep, counts, hidden_states)
        packed, mask = select_tokens(kwargs, packing), kwargs.get("attention_mask")
        spread = self._implementation() == "sdpa" and SpreadQueries.pays(attention, keep)
        skipped = true_places(~keep, keep.numel() - sum(counts))
        keys = packed["past_key_values"] = self._merged_keys(features, keep.shape, skipped, packing, kwargs, spread)
        packed["attention_mask"] = None if spread else self._packed_mask(mask, packing, keep.shape[1], hidden_states)
        with SpreadQueries(packing, mask, keys) if spread else nullcontext():
            ran = self.mod_run(packing.take(hidden_states), packed)
        output = self.mod_skipped_tokens(features, keep, sum(counts), self.mod_residual(hidden_states), skipped)
        packing.put_(ran, output)
        return output

    def _with_mask(self, hidden_states: Tensor, kwargs: dict, context: RoutingContext) -> dict:
        """``kwargs`` with a mask where none means that all tokens see each other; no mask then means causal."""
        tokens = hidden_states.shape[1]
        if tokens == 1 or kwargs.get("attention_mask") is not None:
            return kwargs
        attention, causal = self.mod_attention(), kwargs.get("is_causal")
        causal = getattr(attention, "is_causal", True) if causal is None else causal
        if causal and self._implementation() != "eager":
            return kwargs
        everything = torch.ones(1, 1, tokens, context.past + tokens, dtype=torch.bool, device=hidden_states.device)
        return {**kwargs, "attention_mask": self._mask_type(everything, hidden_states)}

    def _packed_mask(self, mask: Tensor | None, packing: Packing, tokens: int, like: Tensor) -> Tensor | None:
        """The mask of packed queries over the keys of all tokens."""
        chunked = ChunkedMask.pays(packing) and self._implementation() == "sdpa"
        if mask is not None or not chunked:
            length = tokens if mask is None else mask.shape[-1]
            mask = self._mask_type(query_mask(mask, packing, length, tokens), like)
        return ChunkedMask.of(mask, packing, tokens) if chunked else mask

    def _merged_keys(
        self, features: Tensor, shape: torch.Size, skipped: Tensor, packing: Packing, kwargs: dict, all_rows: bool
    ) -> MergedKeys:
        """Keys and values of all tokens: the module projects those that are packed, the rest is projected here."""
        places = evened(skipped, features)
        chosen = features.flatten(0, 1).index_select(0, places)[None]
        positions = flat_positions(kwargs["position_embeddings"], places, shape[1])
        keys, values = (part[0, :, : len(skipped)] for part in project_kv(self.mod_attention(), chosen, positions))
        return MergedKeys(kwargs.get("past_key_values"), packing, shape, skipped, keys, values, all_rows)

    def _run_ragged(
        self, hidden_states: Tensor, features: Tensor, keep: Tensor, counts: list[int] | None, kwargs: dict, context
    ) -> Tensor:
        """Queries, keys and values of kept tokens only."""
        batch, tokens = keep.shape
        layer = None if context.cache is None else context.cache.layers[self.mod_layer]
        if counts is None:
            if layer is None:
                return self.mod_run(hidden_states, kwargs)
            counts = keep.sum(1).tolist()
        output = self.mod_skipped_tokens(features, keep, sum(counts), self.mod_residual(hidden_states))
        view = KeptKeys(layer, context.past)
        if layer is not None:
            layer.mod_open_rows(batch, keep.device)
        if any(counts):
            check_packable(self.mod_attention(), self.mod_layer)
            packing = pack(keep, counts)
            packed = select_tokens(kwargs, packing)
            mask = view.open(packing, kwargs.get("attention_mask"), tokens)
            packed["attention_mask"] = self._mask_type(mask, hidden_states)
            packed["past_key_values"] = view
            with any_shape(keep.device):
                packing.put_(self.mod_run(packing.take(hidden_states), packed), output)
        if layer is not None:
            layer.mod_advance(tokens)
            layer.mod_trim()
        return output

    def _mask_skipped_keys(self, keep: Tensor, hidden_states: Tensor, kwargs: dict) -> Tensor:
        """The module's mask without the keys of skipped tokens; a token always sees itself."""
        check_packable(self.mod_attention(), self.mod_layer)
        tokens = keep.shape[1]
        own = torch.eye(tokens, dtype=torch.bool, device=keep.device)
        offered = (keep[:, None, :] | own)[:, None]
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=keep.device).tril()[None, None]
        if mask.dtype == torch.bool:
            return self._mask_type(mask & offered, hidden_states)
        return mask.masked_fill(~offered, torch.finfo(mask.dtype).min)

    def _mask_type(self, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """A bool mask as this module's attention implementation reads it."""
        if mask is None or mask.dtype != torch.bool or self._implementation() == "sdpa":
            return mask
        return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(like.dtype).min
        )

    def _implementation(self) -> str:
        return self.mod_attention().config._attn_implementation


class RoutedBlock(RoutedAttention):
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
