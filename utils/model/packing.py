"""Packing of kept rows and tokens: gather what runs, scatter what ran, and the masks and positions that go along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a decoder layer and its attention receive per token or per row; everything else passes through untouched.
POSITIONAL = ("position_embeddings", "position_ids")

_ROWS = 64
"""Rows to whose multiples products in half precision are filled up on a CPU, see :func:`evened`."""


@dataclass
class Packing:
    """Kept tokens of a batch, packed to the left: ``x[rows[:, None], index]`` is ``[r, q, …]``.

    Moves go through the flattened batch: index_select and index_copy on whole token vectors are plain copies.

    Attributes:
        rows: int64 ``[r]``, batch rows with at least one kept token (None: every row, in order).
        index: int64 ``[r, q]``, positions of the kept tokens in their order, then of skipped ones as filler.
        slots: bool ``[r, q]``, true for kept tokens; None when there is no filler.
        flat: int64 ``[r·q]``, ``index`` in the flattened batch. counts: kept tokens per packed row.
    """

    row_list: list[int]
    rows: Tensor
    index: Tensor
    flat: Tensor
    slots: Tensor | None
    counts: list[int]

    def take(self, values: Tensor) -> Tensor:
        """``[b, t, d]`` → ``[r, q, d]``."""
        return values.flatten(0, 1).index_select(0, self.flat).view(*self.index.shape, -1)

    def put_(self, packed: Tensor, base: Tensor) -> None:
        """Write ``packed [r, q, d]`` to the places of the kept tokens in ``base [b, t, d]``."""
        if self.slots is not None:
            packed = torch.where(self.slots[..., None], packed, self.take(base).to(packed.dtype))
        base.flatten(0, 1).index_copy_(0, self.flat, packed.flatten(0, 1).to(base.dtype))


def pack(keep: Tensor, counts: list[int], like: Tensor | None = None) -> Packing:
    """Packing of the tokens where ``keep [b, t]`` is true; ``counts`` are its row sums (at least one is positive).

    Args:
        like: values to be packed; with these, filler is added where :func:`evened` would add some.
    """
    row_list = [row for row, count in enumerate(counts) if count]
    kept = [counts[row] for row in row_list]
    rows, tokens = true_places(keep.any(1), len(kept)), keep.shape[1]
    extra = 0 if like is None else -(-_short(len(kept) * max(kept), like) // len(kept))
    width = min(tokens, max(kept) + extra)
    if min(kept) == width:
        flat = true_places(keep, sum(kept))
        return Packing(row_list, rows, (flat % tokens).view(len(kept), -1), flat, None, kept)
    order = keep.to(torch.uint8)[rows].argsort(dim=1, descending=True, stable=True)
    index = order[:, :width]
    flat = (rows[:, None] * tokens + index).flatten()
    return Packing(row_list, rows, index, flat, keep[rows[:, None], index], kept)


def evened(index: Tensor, like: Tensor) -> Tensor:
    """``index [n]`` with its last place repeated, so that products of ``like[index]`` have rows whose number recurs.

    For every new number of rows of a product in half precision oneDNN generates code, on a CPU: 4 ms, where the
    product of 576 by 1,536 with five hundred rows takes one.
    """
    short = _short(len(index), like)
    return torch.cat([index, index[-1:].expand(short)]) if short else index


def _short(count: int, like: Tensor) -> int:
    half = like.device.type == "cpu" and like.dtype in (torch.bfloat16, torch.float16)
    return -count % _ROWS if half and count > _ROWS else 0


def singles(flat: Tensor, tokens: int) -> Packing:
    """Packing of the tokens at flat indices ``row·tokens + position``, a packed row for each."""
    rows = flat // tokens
    return Packing(rows.tolist(), rows, (flat % tokens)[:, None], flat, None, [1] * flat.shape[0])


def true_places(mask: Tensor, count: int) -> Tensor:
    """Flat indices, int64 ``[count]``, of the ``count`` true elements of ``mask``, in order, without a host sync."""
    return torch.nonzero_static(mask.flatten(), size=count)[:, 0]


def check_packable(attention: nn.Module, layer: int) -> None:
    """ValueError for an attention implementation whose masks cannot be packed token by token."""
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"layer {layer}: token-level attention routing needs attn_implementation 'sdpa' or 'eager', "
            f"not {implementation!r}: model.set_attn_implementation('sdpa')"
        )


def select_rows(kwargs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """The keyword arguments of a module, for ``rows`` of a batch of ``batch``."""

    def take(value):
        if isinstance(value, tuple):
            return tuple(take(item) for item in value)
        if getattr(value, "shape", (None,))[0] != batch:
            return value
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        selected, whole = value[rows], value.mask_mod  # a block mask of flex attention: its rule counts rows, too
        selected.mask_mod = lambda row, head, query, key: whole(rows[row], head, query, key)
        return selected

    return {name: take(value) if name in (*POSITIONAL, "attention_mask") else value for name, value in kwargs.items()}


def select_tokens(kwargs: dict[str, Any], packing: Packing) -> dict[str, Any]:
    """The positional keyword arguments of a module, for packed tokens; the mask is the caller's to build."""

    def take(value):
        if isinstance(value, tuple):
            return tuple(take(item) for item in value)
        if not isinstance(value, Tensor):
            return value
        places = (packing.index if value.shape[0] == 1 else packing.flat).flatten().to(value.device)
        return value.flatten(0, 1).index_select(0, places).view(*packing.index.shape, *value.shape[2:])

    return {name: take(value) if name in POSITIONAL else value for name, value in kwargs.items()}


def flat_positions(position_embeddings: tuple[Tensor, Tensor], flat: Tensor, tokens: int) -> tuple[Tensor, ...]:
    """Position embeddings ``[b or 1, t, D]`` at flat token indices ``row·t + position``, as ``[1, n, D]``."""
    index = flat % tokens if position_embeddings[0].shape[0] == 1 else flat
    return tuple(value.flatten(0, 1).index_select(0, index)[None] for value in position_embeddings)


def query_mask(mask: Tensor | None, packing: Packing, keys: int, tokens: int) -> Tensor | None:
    """Rows of an attention mask that belong to packed queries, ``[r, 1, q, keys]``, over all keys.

    Args:
        mask: the module's mask ``[b or 1, 1, t, keys]``, bool or additive, or None for plain causal attention.
    """
    if mask is None:
        if tokens == 1:
            return None
        places = torch.arange(keys, dtype=torch.int32, device=packing.index.device)
        return (places <= packing.index.int()[..., None])[:, None]
    rows = packing.rows if mask.shape[0] > 1 else torch.zeros_like(packing.rows)
    return mask[rows[:, None], :, packing.index].transpose(1, 2)


def key_mask(queries: Tensor | None, key_index: Tensor, stored: Tensor, causal_from: Tensor) -> Tensor | None:
    """Restrict query rows of a mask to the keys really there.

    Args:
        queries: ``[r, 1, q, logical keys]`` (bool or additive), or None for causal attention.
        key_index: int64 ``[r, k]``, the mask column of each packed key; stored: bool ``[r, k]``, false for filler.
        causal_from: int64 ``[r, q]``, the mask column of each query, used where ``queries`` is None.
    """
    if queries is None:
        allowed = key_index[:, None, :] <= causal_from[..., None]
        return (allowed & stored[:, None, :])[:, None]
    columns = key_index.clamp(min=0)[:, None, None, :].expand(-1, queries.shape[1], queries.shape[2], -1)
    mask = queries.gather(3, columns)
    blocked = ~stored[:, None, None, :]
    return mask & ~blocked if mask.dtype == torch.bool else mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
