"""Position-wise modules: run the kept rows or tokens, the skip path (or no update at all) for the others."""

from __future__ import annotations

from torch import Tensor

from .context import RoutingContext
from .packing import evened, true_places
from .routed import Routed, row_counts


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
            flat = hidden_states.flatten(0, 1)
            output = self.mod_skipped_tokens(hidden_states, keep, sum(counts))
            self._run(flat, true_places(keep, sum(counts)), output.flatten(0, 1), *args, **kwargs)
            return output
        rows = self.mod_kept_rows(keep, context)
        if rows.shape[0] == hidden_states.shape[0]:
            return super().forward(hidden_states, *args, **kwargs)
        output = self.mod_skipped(hidden_states)
        if rows.shape[0]:
            self._run(hidden_states, rows, output, *args, **kwargs)
        return output

    def _run(self, states: Tensor, index: Tensor, output: Tensor, *args, **kwargs) -> None:
        """Run the module on ``states[index]``, for ``output[index]``; a list of tokens ``[n, d]`` is one row."""
        taken = states.index_select(0, index if states.dim() == 3 else evened(index, states))
        done = super().forward(taken if states.dim() == 3 else taken[None], *args, **kwargs)
        output.index_copy_(0, index, done.view_as(taken)[: len(index)].to(output.dtype))
