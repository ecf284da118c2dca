"""Named routed classes: what ``auto_map`` points to in a checkpoint that carries its routers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from .configuration_mod import LlamaModConfig, MistralModConfig, ModConfig, Qwen2ModConfig
from .routed_model import RoutedCausalLM, install


class ModPreTrained(RoutedCausalLM):
    """Routes the layers that the config names when the model is built; routers load and stay in float32."""

    _keep_in_fp32_modules_strict = ["mod_router"]

    def __init__(self, config) -> None:
        super().__init__(config)
        routing = ModConfig.read_from(config)
        if routing is not None:
            install(self, routing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if getattr(module, "is_mod_router", False):
            module.weight.zero_()
        elif getattr(module, "is_mod_skip", False):
            module.mod_reset()
        else:
            super()._init_weights(module)


class LlamaModForCausalLM(ModPreTrained, LlamaForCausalLM):
    """Llama with routed layers."""

    config_class = LlamaModConfig


class MistralModForCausalLM(ModPreTrained, MistralForCausalLM):
    """Mistral with routed layers."""

    config_class = MistralModConfig


class Qwen2ModForCausalLM(ModPreTrained, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 with routed layers."""

    config_class = Qwen2ModConfig
