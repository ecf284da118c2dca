"""Dynamic depth for transformers: route a model, train its routers, save and load them."""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache_mod import kv_cache_bytes
from .configuration_mod import GRANULARITIES, LlamaModConfig, MistralModConfig, ModConfig, Qwen2ModConfig
from .fit import fit_skip_paths
from .modeling_mod import LlamaModForCausalLM, MistralModForCausalLM, Qwen2ModForCausalLM
from .recording import RoutingLog, force_routing, record_routing
from .routed_model import prompt_length_from
from .routing import is_routed, route, routed_modules, set_thresholds, unroute
from .saving import load_routers, router_state, save_routers

for _config, _model in (
    (LlamaModConfig, LlamaModForCausalLM),
    (MistralModConfig, MistralModForCausalLM),
    (Qwen2ModConfig, Qwen2ModForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
    _config.register_for_auto_class()
    _model.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "GRANULARITIES",
    "LlamaModConfig",
    "LlamaModForCausalLM",
    "MistralModConfig",
    "MistralModForCausalLM",
    "ModConfig",
    "Qwen2ModConfig",
    "Qwen2ModForCausalLM",
    "RoutingLog",
    "fit_skip_paths",
    "force_routing",
    "is_routed",
    "kv_cache_bytes",
    "load_routers",
    "prompt_length_from",
    "record_routing",
    "route",
    "routed_modules",
    "router_state",
    "save_routers",
    "set_thresholds",
    "unroute",
]
