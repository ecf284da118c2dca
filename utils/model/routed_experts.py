"""One router per expert: a token that the model assigns to an expert is executed there only if its router agrees."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import forced_decision
from .packing import true_places
from .routed import Decision, Routed
from .router import straight_through


class RoutedExperts(Routed):
    """The experts of a sparse MoE block, through the experts interface of transformers.

    ``mod_router`` has one output per expert. Decisions are per assignment: bool ``[tokens, k]`` for the ``k`` experts
    that the model's own gate chose. The gate's weights of executed experts are left as they are.
    """

    mod_part = "expert"

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``Σ_k m_k·w_k·E_k(h)`` for ``hidden_states [n, d]``, ``top_k_index`` and ``top_k_weights [n, k]``."""
        context = self.mod_context()
        logits = None
        shape, device = top_k_index.shape, hidden_states.device
        keep = forced_decision(context.forced, self.mod_layer, self.mod_part, shape, 0, device)
        if keep is None:
            logits = self.mod_router(hidden_states).gather(1, top_k_index)
            keep = logits >= self.mod_logit
        real = None
        if context.real is not None:
            real = context.real.to(keep.device).flatten()[:, None].expand_as(keep)
            keep = keep & real
        if context.record is not None:
            context.record(self.mod_key, keep, logits, real)
        if self.mod_runs_all(Decision(keep, logits), context):
            gate = keep.to(top_k_weights.dtype)
            if logits is not None:
                gate = gate + straight_through(logits).to(gate.dtype)
            return super().forward(hidden_states, top_k_index, top_k_weights * gate)
        missing = ~keep if real is None else real & ~keep
        kept, skipped = torch.stack([keep.sum(), missing.sum()]).tolist()
        if not skipped:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        output = torch.zeros_like(hidden_states)
        if kept:
            chosen = true_places(keep, kept)
            token = chosen // keep.shape[1]
            index, weights = top_k_index.flatten()[chosen, None], top_k_weights.flatten()[chosen, None]
            output.index_add_(0, token, super().forward(hidden_states[token], index, weights).to(output.dtype))
        return output
