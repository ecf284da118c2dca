"""The router, its hard decision and its straight-through gradient (paper section 3.2, equations 2-4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class ModRouter(nn.Module):
    """``z = W·h`` in float32, without bias, zero at the start; ``σ(z)`` is the score.

    Its weight ``[outputs, hidden]`` stays float32 through ``.to(bfloat16)``, ``.half()`` and autocast: the decision
    compares a score with a threshold, and at bf16 resolution whole batches would sit on it.
    """

    is_mod_router = True

    def __init__(self, hidden_size: int, outputs: int = 1, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, hidden_size, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., outputs]`` of ``hidden [..., hidden]``."""
        if not torch.is_autocast_enabled(hidden.device.type):
            return functional.linear(hidden.float(), self.weight.float())
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


def threshold_logit(threshold: float) -> float:
    """``logit(τ)``, so that ``σ(z) ≥ τ`` is ``z ≥ logit(τ)``: exact where σ saturates; τ = 0 keeps all, 1 none."""
    if threshold <= 0:
        return -math.inf
    if threshold >= 1:
        return math.inf
    return math.log(threshold) - math.log1p(-threshold)


def pooled_mean(hidden: Tensor, counted: Tensor | None) -> Tensor:
    """Mean ``[b, d]`` in float32 of ``hidden [b, t, d]`` over the tokens where ``counted [b, t]`` is true."""
    if counted is None:
        return hidden.mean(dim=1, dtype=torch.float32)
    weight = counted.to(device=hidden.device, dtype=torch.float32)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1)
    return (hidden * weight.unsqueeze(-1)).sum(dim=1)


def straight_through(logits: Tensor) -> Tensor:
    """Exactly zero, with the gradient of the score ``σ(z)``: what is added to the hard decision in training."""
    score = torch.sigmoid(logits)
    return score - score.detach()


def merge(keep: Tensor, executed: Tensor, skipped: Tensor, logits: Tensor | None) -> Tensor:
    """``executed`` where ``keep``, else ``skipped``; the backward pass hands ``(executed - skipped)·∂L`` to the score.

    Args:
        keep: bool ``[b]`` or ``[b, t]``; executed, skipped: ``[b, t, d]``; logits: as ``keep``, or None (no gradient).
    """
    shape = (*keep.shape, *[1] * (executed.dim() - keep.dim()))
    merged = torch.where(keep.view(shape), executed, skipped)
    if logits is None or not logits.requires_grad:
        return merged
    return merged + straight_through(logits).view(shape).to(merged.dtype) * (executed - skipped).detach()
