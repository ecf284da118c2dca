"""Position-wise modules: run the kept rows or tokens, the skip path (or no update at all) for the others."""

from __future__ import annotations

from torch import Tensor

from .context import RoutingContext
from .packing import evened, true_places
from .routed import Decision, Routed, row_counts


class RoutedMLP(Routed):
    """An MLP (or sparse MoE block) that runs for kept sequences or tokens only."""

    mod_part = "mlp"

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """``m·MLP(h) + (1−m)·P(h)`` for ``hidden_states [b, t, d]``."""
        context = self.mod_context()
        decision = self.mod_decide(hidden_states, context)
        keep = decision.keep
        if self.mod_runs_all(decision, context):
            output = super().forward(hidden_states, *args, **kwargs)
            return self.mod_merge(decision, hidden_states, output, context)
        return self.mod_unlearnt(self._run_kept(hidden_states, keep, context, *args, **kwargs), context)

    def _run_kept(self, hidden_states: Tensor, keep: Tensor, context: RoutingContext, *args, **kwargs) -> Tensor:
        first = self.mod_first(context)
        if self.mod_level == "sequence" and first is not None:  # a row that is skipped still runs its first token
            keep = keep[:, None] | first
        if keep.dim() == 2:
            counts = row_counts(keep, context.real)
            if counts is None:
                return super().forward(hidden_states, *args, **kwargs)
            if not any(counts):
                return self.mod_skipped(hidden_states)
            if self.mod_runs_for_some(keep):
                output = super().forward(hidden_states, *args, **kwargs)
                return self.mod_merge(Decision(keep, None), hidden_states, output, context)
            index = true_places(keep, sum(counts))
            ran = self._run(hidden_states.flatten(0, 1), index, *args, **kwargs)
            output = self.mod_skipped_tokens(hidden_states, keep, sum(counts))
            output.flatten(0, 1).index_copy_(0, index, ran.to(output.dtype))
            return output
        rows = self.mod_kept_rows(keep, context)
        if rows.shape[0] == hidden_states.shape[0]:
            return super().forward(hidden_states, *args, **kwargs)
        if not rows.shape[0]:
            return self.mod_skipped(hidden_states)
        ran = self._run(hidden_states, rows, *args, **kwargs)
        output = self.mod_skipped(hidden_states)
        return output.index_copy_(0, rows, ran.to(output.dtype))

    def _run(self, states: Tensor, index: Tensor, *args, **kwargs) -> Tensor:
        """The module's output for ``states[index]``; a list of tokens ``[n, d]`` is one row."""
        taken = states.index_select(0, index if states.dim() == 3 else evened(index, states))
        done = super().forward(taken if states.dim() == 3 else taken[None], *args, **kwargs)
        return done.view_as(taken)[: len(index)]
