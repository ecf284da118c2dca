"""The skip path: what a skipped row or token gets in place of a module's output, ``x ← x + m·F(h) + (1−m)·P(h)``.

The published method leaves zero, which no layer behind has ever seen. A low-rank affine map of the module's input,
about one percent of its cost, repairs most of that. It says nothing about the first token of a sequence (the attention
sink, whose activations are hundreds of times larger), so where there is a skip path that token always runs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization

from .router import AddedByRouting

_FEW = 64
"""So few tokens are multiplied in float32: the CPU's kernels for bf16 take longer to start than that takes."""


class SkipPath(AddedByRouting):
    """``P(h) = b + (h·U)·V``, or ``P(h) = b`` where ``rank`` is 0; exactly zero at the start.

    Parameters are float32 and small; the product of many tokens is taken in their own type.

    Attributes:
        bias: ``b [hidden]``. down: ``U [hidden, rank]``. up: ``V [rank, hidden]``.
    """

    def __init__(self, hidden_size: int, rank: int, device: torch.device | None = None) -> None:
        super().__init__()
        place = {"device": device, "dtype": torch.float32}
        self.bias = nn.Parameter(torch.empty(hidden_size, **place))
        self.down = nn.Parameter(torch.empty(hidden_size, rank, **place)) if rank else None
        self.up = nn.Parameter(torch.empty(rank, hidden_size, **place)) if rank else None
        self.mod_reset()

    @torch.no_grad()
    def mod_reset(self) -> None:
        """``b`` and ``V`` zero; ``U`` small numbers, always the same, without which ``V`` would get no gradient."""
        initialization.zeros_(self.bias)
        if self.down is not None:
            initialization.zeros_(self.up)
            generator = torch.Generator("cpu").manual_seed(0)
            values = torch.randn(self.down.shape, generator=generator, device="cpu", dtype=torch.float32)
            initialization.copy_(self.down, values / math.sqrt(self.down.shape[0]))

    def forward(self, hidden: Tensor) -> Tensor:
        """``P(h)`` in a tensor of its own, ``[..., hidden]`` in the type of ``hidden``."""
        if self.down is None:
            return self.bias.to(hidden.dtype).expand_as(hidden).clone()
        flat = hidden.flatten(0, -2)
        dtype = flat.dtype if len(flat) > _FEW else torch.promote_types(flat.dtype, torch.float32)
        down, up, bias = (parameter.to(dtype) for parameter in (self.down, self.up, self.bias))
        return torch.addmm(bias, flat.to(dtype) @ down, up).to(hidden.dtype).view(hidden.shape)


def first_tokens(
    shape: torch.Size, attention_mask: Any, position_ids: Tensor | None, past: int, cache: Any, device: torch.device
) -> Tensor | None:
    """Bool ``[b, t]``, true for the first real token of each sequence; None where this pass can hold none.

    Args:
        shape: ``(b, t)`` of the pass. attention_mask: of the past and the pass, ``[b, past + t]``. Without one, or
            with one that says nothing about padding, a row begins at its first token, and where positions restart.
        cache: remembers how far the padding on the left reaches, so that decoding need not ask.
    """
    if past and past > getattr(cache, "mod_left_padding", past):
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        seen = attention_mask.bool().cumsum(1)
        if cache is not None:
            cache.mod_left_padding = int((seen == 0).sum(1).max())
        return ((seen == 1) & attention_mask.bool())[:, -shape[1] :].to(device)
    if cache is not None:
        cache.mod_left_padding = 0
    first = torch.zeros(shape, dtype=torch.bool, device=device)
    first[:, 0] = past == 0
    if position_ids is not None and position_ids.dim() == 2:
        first[:, 1:] |= (position_ids.diff(dim=1) < 0).to(device)
    return first if past == 0 or shape[1] > 1 else None
