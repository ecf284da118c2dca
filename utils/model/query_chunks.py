"""Attention of packed queries in chunks: each looks only at the keys that its last query may see.

A kernel that is told "causal" leaves out what lies behind the diagonal. Packed queries need a mask instead, and with
one the kernels compute every query-key pair: half of the queries would then cost as much as all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_LEAST = 64
_MOST_CHUNKS = 8
"""n chunks leave (n + 1) / 2n of the pairs: 0.56 at eight, against the 0.5 that no number of chunks goes below."""


class QueryChunks(TorchFunctionMode):
    """While active, ``scaled_dot_product_attention`` with a mask runs chunk by chunk.

    Args:
        index: int64 ``[r, q]``, positions of the packed queries in their pass, ascending in each row but for filler at
            its end, whose output nobody reads. tokens: length of the pass; its keys are the last ``tokens`` ones.
    """

    def __init__(self, index: Tensor, tokens: int) -> None:
        super().__init__()
        queries = index.shape[1]
        chunks = min(_MOST_CHUNKS, queries // _LEAST)
        self.ends = [queries * (number + 1) // chunks for number in range(chunks)]
        reached = index.cummax(1).values[:, [end - 1 for end in self.ends]].amax(0)
        self.behind = [tokens - 1 - position for position in reached.tolist()]

    @staticmethod
    def pays(index: Tensor) -> bool:
        """Whether there is more than one chunk; a graph that is being compiled stays as it is."""
        return index.shape[1] >= 2 * _LEAST and not torch.compiler.is_compiling()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        mask = kwargs.get("attn_mask")
        if func is not scaled_dot_product_attention or mask is None:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor, **kwargs) -> Tensor:
        parts, start = [], 0
        for end, behind in zip(self.ends, self.behind, strict=True):
            keys = key.shape[2] - behind
            part = query[:, :, start:end], key[:, :, :keys], value[:, :, :keys]
            mask = attn_mask[:, :, start:end, :keys]
            parts.append(scaled_dot_product_attention(*part, attn_mask=mask, **kwargs).transpose(1, 2))
            start = end
        return torch.cat(parts, dim=1).transpose(1, 2)  # laid out as a module reads it next, token by token
