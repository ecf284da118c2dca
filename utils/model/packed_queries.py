"""What a module is given to run on packed queries: tensors that know what need not be computed, or not at once.

Both are plain tensors to all functions but one: no other operation of the module passes through Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

_LEAST = 32
_MOST_CHUNKS = 8
"""n chunks leave (n + 1) / 2n of the pairs: 0.56 at eight, against the 0.5 that no number of chunks goes below."""


class PackedHidden(Tensor):
    """Hidden states ``[r, q, d]`` whose projections to keys and values the cache's stand-in has already.

    Attributes:
        spared: weights of those projections. head_dim: how many zeros the module gets instead of their result.
    """

    spared: Sequence[Tensor]
    head_dim: int

    @classmethod
    def of(cls, hidden: Tensor, spared: Sequence[Tensor], head_dim: int) -> Tensor:
        """``hidden``, which forgets what is spared with the first projection that it passes through."""
        if not spared:
            return hidden
        hidden = hidden.as_subclass(cls)
        hidden.spared, hidden.head_dim = spared, head_dim
        return hidden

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is not linear:
                result = func(*args, **(kwargs or {}))
                if not isinstance(result, Tensor) or func is Tensor.as_subclass:
                    return result
                known = next(value for value in args if isinstance(value, cls))
                return cls.of(result, known.spared, known.head_dim)
            hidden, weight = args[:2]
            if any(weight is known for known in hidden.spared):
                return hidden.new_zeros(()).expand(*hidden.shape[:-1], hidden.head_dim)
            return func(*args, **(kwargs or {}))


class ChunkedMask(Tensor):
    """A mask ``[r, 1, q, keys]`` with which attention runs in chunks, each on the keys that its last query may see.

    A kernel that is told "causal" leaves out what lies behind the diagonal. Packed queries need a mask instead, and
    with one the kernels compute every pair: half of the queries would then cost as much as all of them.

    Attributes:
        ends: where the chunks of queries end. behind: how many of the last keys each of them does not see.
    """

    ends: list[int]
    behind: list[int]

    @classmethod
    def of(cls, mask: Tensor | None, index: Tensor, tokens: int) -> Tensor | None:
        """``mask``, in chunks where there is more than one; a graph that is being compiled stays as it is.

        Args:
            index: int64 ``[r, q]``, positions of the queries in their pass, ascending in each row but for filler at
                its end, whose output nobody reads. tokens: length of the pass; its keys are the last ``tokens`` ones.
        """
        queries = index.shape[1]
        chunks = min(_MOST_CHUNKS, queries // _LEAST)
        if chunks < 2 or mask is None or torch.compiler.is_compiling():
            return mask
        mask = mask.as_subclass(cls)
        mask.ends = [queries * (number + 1) // chunks for number in range(chunks)]
        reached = index.cummax(1).values[:, [end - 1 for end in mask.ends]].amax(0)
        mask.behind = [tokens - 1 - position for position in reached.tolist()]
        return mask

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is scaled_dot_product_attention:
                return _in_chunks(*args, **kwargs)
            return func(*args, **(kwargs or {}))


def _in_chunks(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: ChunkedMask, **kwargs) -> Tensor:
    parts, start = [], 0
    mask = attn_mask.as_subclass(Tensor)
    for end, behind in zip(attn_mask.ends, attn_mask.behind, strict=True):
        keys = key.shape[2] - behind
        part = query[:, :, start:end], key[:, :, :keys], value[:, :, :keys]
        masked = mask[:, :, start:end, :keys]
        parts.append(scaled_dot_product_attention(*part, attn_mask=masked, **kwargs).transpose(1, 2))
        start = end
    return torch.cat(parts, dim=1).transpose(1, 2)  # laid out as a module reads it next, token by token
