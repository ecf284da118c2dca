"""Routed modules on vLLM's flat list of tokens: kept ones are gathered, run and scattered, the others get ``P(h)``.

A module's own class stays what it is, with a mixin in front; the names of its weights do not change. Every rank of
tensor parallelism sees the same hidden states, bit by bit, and has the whole router: all decide alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from router_tuning.model.router import ModRouter
from router_tuning.model.skip_path import SkipPath
from router_tuning.serving.graphs import routed_module


class Pass:
    """What all routed modules of a model know of the forward pass under way.

    Attributes:
        always: bool ``[n]``, tokens that run whatever the routers say; None if there are none.
    """

    always: Tensor | None = None


class Routed:
    """Mixin in front of a module's own class; ``super().forward`` is the module itself."""

    mod_router: ModRouter
    mod_skip: SkipPath | None
    mod_name: str
    mod_logit: float
    mod_pass: Pass

    def mod_places(self, hidden: Tensor) -> Tensor | None:
        """Places, int64 ``[k]``, of the tokens of ``hidden [n, d]`` for which the module runs; None for all."""
        keep = self.mod_router(hidden)[:, 0] >= self.mod_logit
        if self.mod_pass.always is not None:
            keep |= self.mod_pass.always
        places = keep.nonzero()[:, 0]
        return None if len(places) == len(keep) else places

    def mod_output(self, hidden: Tensor, places: Tensor, executed: Tensor) -> Tensor:
        """``executed [k, d]`` at ``places``, else ``P(h)``, ``[n, d]``."""
        output = torch.zeros_like(hidden) if self.mod_skip is None else self.mod_skip(hidden)
        return output.index_copy_(0, places, executed[: len(places)].to(output.dtype))


class RoutedMLP(Routed):
    """An MLP that runs for kept tokens only."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``m·MLP(h) + (1−m)·P(h)`` for ``hidden_states [n, d]``."""
        if torch.compiler.is_compiling():
            return routed_module(hidden_states, None, self.mod_name)
        places = self.mod_places(hidden_states)
        if places is None:
            return super().forward(hidden_states)
        taken = hidden_states.index_select(0, places)
        return self.mod_output(hidden_states, places, super().forward(taken) if len(places) else taken)


class RoutedAttention(Routed):
    """An attention that writes the keys and values of all tokens, and gives the output of kept ones only."""

    attn: KeptQueries

    def forward(self, positions: Tensor, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """``m·Attn(h) + (1−m)·P(h)`` for ``hidden_states [n, d]``."""
        if torch.compiler.is_compiling():
            return routed_module(hidden_states, positions, self.mod_name)
        places = self.mod_places(hidden_states)
        if places is None:
            return super().forward(positions=positions, hidden_states=hidden_states, **kwargs)
        self.attn.mod_places = places
        try:
            executed = super().forward(positions=positions, hidden_states=hidden_states, **kwargs)
        finally:
            self.attn.mod_places = None
        return self.mod_output(hidden_states, places, executed)


class KeptQueries:
    """Mixin in front of vLLM's own attention layer, which stands between the projections of a module."""

    mod_places: Tensor | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of the attention's output, ``[k, heads·head size]``, that belong to kept tokens.

        Where none is kept and the backend can write to the cache without attending, that is all it does; one row runs
        on through the output projection for nothing, since not all kernels take an empty matrix.
        """
        places = self.mod_places
        if places is None:
            return super().forward(query, key, value, *args, **kwargs)
        if len(places) == 0 and not self.attn_backend.forward_includes_kv_cache_update:
            from vllm.model_executor.layers.attention.attention import unified_kv_cache_update

            key, value = (states.view(len(query), self.num_kv_heads, -1) for states in (key, value))
            unified_kv_cache_update(key, value, self.layer_name)
            return query[:1]
        output = super().forward(query, key, value, *args, **kwargs)
        return output.index_select(0, places) if len(places) else output[:1]


def put_in_front(module: nn.Module, mixin: type) -> None:
    """Put ``mixin`` in front of the class of ``module``."""
    module.__class__ = type(type(module).__name__, (mixin, type(module)), {})


def route_module(module: nn.Module, mixin: type[Routed], hidden_size: int, rank: int | None) -> None:
    """Give ``module`` an untrained router and skip path (of ``rank``; 0: its mean alone, None: zero)."""
    put_in_front(module, mixin)
    module.mod_router = ModRouter(hidden_size)
    module.mod_skip = None if rank is None else SkipPath(hidden_size, rank)
