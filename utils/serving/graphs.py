"""Routed modules in compiled graphs: one opaque operation, at which vLLM splits its graphs as it does at attention.

What runs between the pieces runs as without graphs, and may look at decisions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

OPERATION = "router_tuning::routed_module"


@torch.library.custom_op(OPERATION, mutates_args=())
def routed_module(hidden_states: Tensor, positions: Tensor | None, name: str) -> Tensor:
    """Output of the routed module ``name`` of the model under way, for ``hidden_states [n, d]``."""
    from vllm.forward_context import get_forward_context

    inputs = {} if positions is None else {"positions": positions}
    return get_forward_context().no_compile_layers[name](hidden_states=hidden_states, **inputs)


@routed_module.register_fake
def _(hidden_states: Tensor, positions: Tensor | None, name: str) -> Tensor:
    return torch.empty_like(hidden_states)


def split_graphs(compilation: Any) -> None:
    """Have vLLM capture pieces between routed modules and attentions, and no step as a whole."""
    from vllm.config import CUDAGraphMode

    caches = ["vllm::unified_kv_cache_update", "vllm::unified_mla_kv_cache_update"]
    chosen = compilation.splitting_ops
    compilation.splitting_ops = [*(compilation._attention_ops + caches if chosen is None else chosen), OPERATION]
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
