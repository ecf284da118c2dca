"""What all routed modules share: a router, and the decision it takes for the rows or tokens of one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .context import RouterKey, RoutingContext, current_context, forced_decision
from .packing import evened, true_places
from .router import ModRouter, Unlearnt, merge, pooled_mean, threshold_logit
from .skip_path import SkipPath

_FEW = 32
"""Sequences decoded together for which a module runs whole or not at all, see :meth:`Routed.mod_runs_for_some`."""


class Decision(NamedTuple):
    """``keep``: bool ``[b]`` (sequence) or ``[b, t]`` (token); ``logits``: float32 alike, None if held or forced."""

    keep: Tensor
    logits: Tensor | None


class Routed:
    """Mixin in front of a module's own class; ``super().forward`` is the module itself.

    Attributes:
        mod_router: its router. mod_skip: its skip path, None for the published zero.
        mod_layer: its decoder layer. mod_part: ``attn``, ``mlp``, ``block`` or ``expert``.
        mod_level: ``sequence`` or ``token``. mod_logit: logit of its threshold. mod_kv_policy: ``keep`` or ``drop``.
        mod_key: the name of its router in a routing log.
    """

    mod_part: str
    mod_router: ModRouter
    mod_skip: SkipPath | None
    mod_layer: int
    mod_level: str
    mod_logit: float
    mod_kv_policy: str
    mod_key: RouterKey

    def mod_set_threshold(self, threshold: float) -> None:
        """Set τ of this router."""
        self.mod_threshold = threshold
        self.mod_logit = threshold_logit(threshold)

    def mod_context(self) -> RoutingContext:
        """The pass under way; a module called on its own sees every token as real and no cache.

        Raises:
            ValueError: under reentrant checkpointing, which hides the routers of this pass from autograd.
        """
        context = current_context() or RoutingContext(training=self.training and torch.is_grad_enabled())
        if context.training and context.observe is None and not torch.is_grad_enabled():
            raise ValueError(
                "routers get no gradient under reentrant gradient checkpointing: pass "
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return context

    def mod_decide(self, hidden: Tensor, context: RoutingContext) -> Decision:
        """``m = 1[σ(W·h) ≥ τ]`` for ``hidden [b, t, d]``.

        A sequence's decision is taken in the pass that brings its first token, and held for the life of the cache.
        Padding decides nothing: a sequence of which nothing has come yet runs along, and at token level padding is
        never kept, and the first token of a sequence always where there is a skip path.
        """
        sequence = self.mod_level == "sequence"
        held = self._mod_held(context) if sequence else None
        if held is not None:
            held = held.to(hidden.device)
            if not context.decides:
                return Decision(held, None)
        keep = logits = None
        if context.forced is not None:
            shape = hidden.shape[:1] if sequence else hidden.shape[:2]
            keep = forced_decision(context.forced, self.mod_layer, self.mod_part, shape, context.past, hidden.device)
        if keep is None:
            features = pooled_mean(hidden, context.pool) if sequence else hidden
            logits = self.mod_router(features)[..., 0]
            keep = logits >= self.mod_logit
        real = context.decided if sequence else context.real
        if real is not None:
            real = real.to(keep.device)
            keep = torch.where(real, keep, True if held is None else held) if sequence else keep & real
        if not sequence and self.mod_first(context) is not None:
            keep = keep | context.first
            if logits is not None and logits.requires_grad:  # no decision of the router's
                logits = torch.where(context.first, logits.detach(), logits)
        if context.record is not None:
            context.record(self.mod_key, keep, logits, real)
        if sequence and context.cache is not None:
            context.cache.layers[self.mod_layer].mod_hold(self.mod_part, keep, context.blank)
        return Decision(keep, logits)

    def mod_runs_all(self, decision: Decision, context: RoutingContext, whole: bool = True) -> bool:
        """Whether what is skipped runs too, since the router's score needs its gradient, in training or not.

        Args:
            whole: whether this pass holds all that the module would have seen, had nothing been skipped before.
        """
        return context.training or (whole and decision.logits is not None and decision.logits.requires_grad)

    def mod_unlearnt(self, output: Tensor, context: RoutingContext) -> Tensor:
        """``output`` of what is kept; an error in the backward pass where the router would miss its gradient."""
        learns = torch.is_grad_enabled() and self.mod_router.weight.requires_grad
        return Unlearnt.apply(output, self.mod_layer) if learns and context.past and context.forced is None else output

    def mod_first(self, context: RoutingContext) -> Tensor | None:
        """Tokens ``[b, t]`` of this pass that run whatever the router says, or None."""
        return None if self.mod_skip is None else context.first

    def mod_skipped(self, features: Tensor, residual: Tensor | None = None, skipped: Tensor | None = None) -> Tensor:
        """What is skipped gets: ``P(h)`` or zeros, on top of ``residual`` for a block; a tensor of its own.

        Args:
            skipped: int64 ``[n]``, places along the first axis; all others are left undefined. None: all places.
        """
        if self.mod_skip is None:
            return torch.zeros_like(features) if residual is None else residual.clone()
        if skipped is None:
            path = self.mod_skip(features)
            return path if residual is None else residual + path
        path = self.mod_skip(features.index_select(0, evened(skipped, features)))[: len(skipped)]
        if residual is not None:
            path = residual.index_select(0, skipped) + path
        return torch.empty_like(features if residual is None else residual).index_copy_(0, skipped, path)

    def mod_skipped_tokens(
        self,
        features: Tensor,
        keep: Tensor,
        count: int,
        residual: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> Tensor:
        """:meth:`mod_skipped` where ``keep [b, t]``, ``count`` of them true, leaves tokens to skip, ``[b, t, d]``.

        Args:
            skipped: int64 ``[n]``, their places in the flattened batch, where the caller has them already.
        """
        if self.mod_skip is None or keep.shape[1] == 1:
            return self.mod_skipped(features, residual)
        flat = None if residual is None else residual.flatten(0, 1)
        skipped = true_places(~keep, keep.numel() - count) if skipped is None else skipped
        return self.mod_skipped(features.flatten(0, 1), flat, skipped).view_as(features)

    def mod_merge(
        self,
        decision: Decision,
        features: Tensor,
        executed: Tensor,
        context: RoutingContext,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The output of a pass in which everything ran, ``[b, t, d]``, with the straight-through gradient."""
        keep, logits = decision
        if context.observe is not None:
            context.observe(self, features, executed if residual is None else executed - residual, keep, context)
        skipped, first = self.mod_skipped(features, residual), self.mod_first(context)
        if first is not None:
            skipped = torch.where(first[..., None], executed, skipped)
        return merge(keep, executed, skipped, logits)

    def mod_runs_for_some(self, keep: Tensor) -> bool:
        """Whether a pass in which some of ``keep [b, t]`` run lets all run: a step of decoding a few sequences.

        Reading a module's matrices takes the time there, however many rows they are multiplied with.
        """
        return keep.shape[1] == 1 and len(keep) <= _FEW

    def mod_kept_rows(self, keep: Tensor, context: RoutingContext) -> Tensor:
        """Row indices of a sequence-level decision."""
        if context.cache is None:
            return keep.nonzero().flatten()
        return context.cache.layers[self.mod_layer].mod_kept_rows(self.mod_part).to(keep.device)

    def _mod_held(self, context: RoutingContext) -> Tensor | None:
        if context.cache is None or context.past == 0:
            return None
        held = getattr(context.cache.layers[self.mod_layer], "mod_decisions", {}).get(self.mod_part)
        if held is None:
            raise ValueError(f"layer {self.mod_layer}: this cache holds no decision for {self.mod_part!r}; start anew")
        return held


def row_counts(keep: Tensor, real: Tensor | None) -> list[int] | None:
    """Kept tokens per row of ``keep [b, t]``, or None when every real token is kept (one host sync)."""
    if keep.numel() == 1:  # decoding one sequence; what is decoded is real
        return None if keep.item() else [0]
    if real is None:
        counts = keep.sum(1).tolist()
        return None if sum(counts) == keep.numel() else counts
    *counts, skipped = torch.cat([keep.sum(1), (real.to(keep.device) & ~keep).sum().view(1)]).tolist()
    return counts if skipped else None
