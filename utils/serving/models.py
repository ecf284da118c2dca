"""Routed models of vLLM, ``LlamaModForCausalLM`` and so on: its own classes, of which some modules are routed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.utils import PPMissingLayer

from router_tuning.model.router import threshold_logit
from router_tuning.serving import FAMILIES
from router_tuning.serving.routed_modules import (
    KeptQueries,
    Pass,
    Routed,
    RoutedAttention,
    RoutedMLP,
    put_in_front,
    route_module,
)
from router_tuning.serving.served_routing import served_routing

RANKS = {"zero": None, "mean": 0}


class RoutedCausalLM:
    """Mixin in front of a causal LM of vLLM."""

    supports_lora = False  # its kernels know the adapter of a token by its place in the batch, which gathering changes

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        routing = served_routing(config)
        self.mod_pass, self.mod_first_runs = Pass(), routing.skip != "zero"
        self.mod_modules: dict[str, Routed] = {}
        for layer, part in routing.targets:
            if isinstance(self.model.layers[layer], PPMissingLayer):
                continue
            module = self.model.layers[layer].mlp if part == "mlp" else self.model.layers[layer].self_attn
            rank = RANKS.get(routing.skip, routing.skip_rank)
            route_module(module, RoutedMLP if part == "mlp" else RoutedAttention, config.hidden_size, rank)
            module.mod_pass, module.mod_name = self.mod_pass, f"{prefix}routed.{layer}.{part}"
            vllm_config.compilation_config.static_forward_context[module.mod_name] = module
            self.mod_modules[f"{layer}.{part}"] = module
            if part == "attn":
                put_in_front(module.attn, KeptQueries)
        thresholds = routing.thresholds(routing.targets)
        self.set_thresholds({f"{layer}.{part}": value for (layer, part), value in thresholds.items()})

    def set_thresholds(self, thresholds: Mapping[str, float]) -> None:
        """Set τ by router, ``"<layer>.<part>"``; what is cached of earlier tokens stays as it was."""
        for name, module in self.mod_modules.items():
            module.mod_logit = threshold_logit(thresholds[name])

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of any model; the first token of a sequence runs where there is a skip path, which says nothing of it."""
        if get_forward_context().attn_metadata is None:  # the memory that a pass needs is being measured
            self.mod_pass.always = torch.ones_like(positions, dtype=torch.bool)
        else:
            self.mod_pass.always = positions == 0 if self.mod_first_runs else None
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As of any model; ValueError for routers and skip paths with values that are not finite."""
        loaded = super().load_weights(weights)
        for name, weight in self.named_parameters():
            if (".mod_router." in name or ".mod_skip." in name) and not bool(weight.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite; export the run anew")
        return loaded


for _family in FAMILIES:
    _module = import_module(f"vllm.model_executor.models.{_family.lower()}")
    _parents = (RoutedCausalLM, getattr(_module, f"{_family}ForCausalLM"))
    _about = {"__module__": __name__, "__doc__": f"{_family} with routed layers."}
    globals()[f"{_family}ModForCausalLM"] = type(f"{_family}ModForCausalLM", _parents, _about)
