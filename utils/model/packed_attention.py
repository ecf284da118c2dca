"""Attention of packed queries: in chunks on a CPU, spread out on a GPU, as the kernels there take it best."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .keys_values import MergedKeys
from .packing import Packing

_WORTH = 128
"""Fewer queries than these run in one go: what chunks would save is less than what they cost."""
_LEAST = 32
"""Queries in a chunk, at least: the block of queries that the CPU kernel works on."""
_MOST_CHUNKS = 8
"""n chunks leave (n + 1) / 2n of the pairs: 0.56 at eight, against the 0.5 that no number of chunks goes below."""


def any_shape(device: torch.device) -> AbstractContextManager[None]:
    """Where decisions make the shapes: on a GPU without cuDNN, which plans anew for each, for tenths of a second."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class SpreadQueries(TorchFunctionMode):
    """Within the block packed queries attend from where they stood, between zeros, and are packed again.

    On a GPU the kernels for plain causal attention take all queries in less time than those that are given a mask
    take half of them, and for one token per row this moves the queries, not the keys and values of their past.

    Args:
        packing: of the queries. mask: of all queries over ``keys``, or None for causal attention; the module is given
            none. keys: the stand-in for its cache, which holds what the queries attend to.
    """

    def __init__(self, packing: Packing, mask: Tensor | None, keys: MergedKeys) -> None:
        super().__init__()
        self.packing, self.mask, self.keys = packing, mask, keys

    @staticmethod
    def pays(attention: nn.Module, keep: Tensor) -> bool:
        """Whether the queries where ``keep [b, t]`` are to be spread; heads of more than 256 have no such kernels."""
        return keep.is_cuda and attention.head_dim <= 256 and not torch.compiler.is_compiling()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, _: Tensor, **options) -> Tensor:
        key_states, value_states = self.keys.merged
        if key.data_ptr() != key_states.data_ptr():
            raise ValueError("this attention changes its keys behind its cache: set_attn_implementation('eager')")
        shape, flat, packed = self.keys.shape, self.packing.flat, query.transpose(1, 2).flatten(0, 1)
        spread = packed.new_zeros(shape.numel(), *packed.shape[1:]).index_copy_(0, flat, packed)
        groups = query.shape[1] // key_states.shape[1]
        if self.mask is not None and groups > 1:  # a kernel that takes both masks and groups there is not
            key_states, value_states = (s.repeat_interleave(groups, dim=1) for s in (key_states, value_states))
        made = scaled_dot_product_attention(
            spread.view(*shape, *packed.shape[1:]).transpose(1, 2), key_states, value_states,
            **{**options, "attn_mask": self.mask, "is_causal": self.mask is None and shape[1] > 1,
               "enable_gqa": self.mask is None and groups > 1},
        )  # fmt: skip
        kept = made.transpose(1, 2).flatten(0, 1).index_select(0, flat)
        return kept.view(*self.packing.index.shape, *kept.shape[1:]).transpose(1, 2)


class ChunkedMask(Tensor):
    """A mask with which attention runs in chunks of queries, each on the keys that its last query may see.

    A kernel that is told "causal" leaves out what lies behind the diagonal. Packed queries need a mask instead, and
    with one the kernels compute every pair: half of the queries would then cost as much as all of them.

    Its values are a mask ``[r, 1, q, keys]`` or, for causal attention over one pass, how many keys lie ``ahead`` of
    each query, int64 ``[r, 1, q, 1]``, from which each chunk makes its own.

    Attributes:
        size: queries in a chunk. behind: how many of the last keys each chunk does not see. ahead: whether the values
        are these.
    """

    size: int
    behind: list[int]
    ahead: bool

    @classmethod
    def of(cls, mask: Tensor | None, packing: Packing, tokens: int) -> Tensor:
        """``mask``, or the causal one where it is None, for chunks; the caller asks :meth:`pays` first.

        Args:
            packing: of the queries. tokens: length of their pass, whose keys are the last ``tokens`` ones.
        """
        index, queries = packing.index, packing.index.shape[1]
        size = -(-queries // min(_MOST_CHUNKS, queries // _LEAST))
        chunked = ((tokens - 1 - index)[:, None, :, None] if mask is None else mask).as_subclass(cls)
        chunked.size, chunked.ahead = size, mask is None
        if mask is None:
            # Positions ascend in each row but for filler at its end, whose output nobody reads.
            reached = index if packing.slots is None else index.cummax(1).values
            ends = torch.cat([reached[:, size - 1 : queries - 1 : size], reached[:, -1:]], dim=1)
            chunked.behind = [tokens - 1 - position for position in ends.amax(0).tolist()]
        else:
            chunked.behind = _unseen(mask, packing, size)
        return chunked

    @staticmethod
    def pays(packing: Packing) -> bool:
        """Whether there is more than one chunk; a graph that is being compiled stays as it is."""
        return packing.index.shape[1] >= _WORTH and not torch.compiler.is_compiling()

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _in_chunks(*args, **kwargs)
            return func(*args, **(kwargs or {}))


def _unseen(mask: Tensor, packing: Packing, size: int) -> list[int]:
    """How many of the last keys no query of a chunk sees, by the mask itself, which need not be causal."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if packing.slots is not None:
        seen = seen & packing.slots[:, None, :, None]
    by_chunk = torch.stack([chunk.any(0) for chunk in seen.flatten(0, 1).any(0).split(size)])  # [chunks, keys]
    keys = by_chunk.shape[1]
    last = (by_chunk * torch.arange(1, keys + 1, device=mask.device)).amax(1).clamp(min=1)
    return (keys - last).tolist()


def _in_chunks(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: ChunkedMask, **kwargs) -> Tensor:
    rows, heads, count, _ = query.shape
    output = query.new_empty(rows, count, heads, value.shape[-1])  # as a module reads it next: token by token
    size = attn_mask.size
    causal = _causal_rows(key.shape[2], query) if attn_mask.ahead else None
    splits = (query.split(size, dim=2), attn_mask.split(size, dim=2), attn_mask.behind)
    for start, queries, mask, behind in zip(range(0, count, size), *splits, strict=True):
        keys = key.shape[2] - behind
        seen = key.narrow(2, 0, keys), value.narrow(2, 0, keys)
        if causal is None:
            mask = mask.narrow(3, 0, keys)
        else:
            mask = causal.narrow(1, 0, keys).index_select(0, mask.flatten()).view(*mask.shape[:3], keys)
        made = scaled_dot_product_attention(queries, *seen, attn_mask=mask, **kwargs).transpose(1, 2)
        output.narrow(1, start, made.shape[1]).copy_(made)
    return output.transpose(1, 2)


def _causal_rows(keys: int, like: Tensor) -> Tensor:
    """Additive masks, row ``n`` for a query that ``n`` keys lie ahead of: a view of ``2·keys`` numbers."""
    seen_or_not = like.new_zeros(2 * keys)
    seen_or_not[keys:] = float("-inf")
    return seen_or_not.unfold(0, keys, 1)
