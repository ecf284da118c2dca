"""The router, its hard decision and its straight-through gradient (paper section 3.2, equations 2-4)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization


class AddedByRouting(nn.Module):
    """What routing adds to a model: small, float32 whatever the model's type, and never memory as it was.

    Parameters stay float32 through ``.to(bfloat16)`` and ``.half()``, and are at their start wherever no checkpoint
    says otherwise.
    """

    def mod_reset(self) -> None:
        """Put every parameter that was not loaded at its start."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        empty = any(parameter.is_meta for parameter in self.parameters())
        super()._apply(keep_dtype, recurse)
        if empty and not any(parameter.is_meta for parameter in self.parameters()):
            self.mod_reset()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        if local_metadata.get("assign_to_params_buffers") and any(p.is_meta for p in self.parameters()):
            self.to_empty(device="cpu")
        for name in (f"{prefix}{name}" for name, _ in self.named_parameters()):
            if name in state_dict:
                state_dict[name] = state_dict[name].float()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class InitializesRouting:
    """Mixin for a transformers model, nested or not: what a checkpoint lacks of routing is at its start."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "mod_reset"):
            module.mod_reset()
            module.mod_missing = True
        else:
            super()._init_weights(module)


class ModRouter(AddedByRouting):
    """``z = W·h`` in float32, without bias, zero at the start; ``σ(z)`` is the score.

    Its weight is ``[outputs, hidden]``. Weight and product are never rounded, not even under autocast: a decision
    compares the score with a threshold, and at bf16 resolution whole batches would sit on it.
    """

    def __init__(self, hidden_size: int, outputs: int = 1, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, hidden_size, dtype=torch.float32, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., outputs]`` of ``hidden [..., hidden]``."""
        if not torch.is_autocast_enabled(hidden.device.type):
            return functional.linear(hidden.float(), self.weight.float())
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())

    def mod_reset(self) -> None:
        initialization.zeros_(self.weight)


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


class Unlearnt(torch.autograd.Function):
    """The identity, which lets no gradient pass that a router would have to share."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, layer: int) -> Tensor:
        ctx.layer = layer
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        raise ValueError(
            f"layer {ctx.layer}: behind a past that its cache holds in part a router gets no gradient: pass the whole "
            "sequence without past_key_values, or freeze the routers"
        )


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
