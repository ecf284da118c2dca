"""Routing a decoder in place, and back: which modules get a router."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from .cache_mod import HeldDecisions, RaggedCacheLayer, RowCacheLayer
from .class_swap import mix_in, mix_out
from .configuration_mod import ModConfig, select_layers
from .context import carry
from .modules import decoder_of, device_of, find_module
from .routed import Routed
from .routed_attention import RoutedAttention, RoutedBlock
from .routed_experts import RoutedExperts
from .routed_mlp import RoutedMLP
from .routed_model import RoutedDecoder
from .router import ModRouter
from .skip_path import SkipPath

MIXINS: dict[str, type[Routed]] = {
    "attn": RoutedAttention,
    "mlp": RoutedMLP,
    "block": RoutedBlock,
    "expert": RoutedExperts,
}


def install(model: PreTrainedModel, config: ModConfig) -> None:
    """Route ``model`` in place as ``config`` says; routers start at zero (everything runs at τ ≤ 0.5)."""
    decoder = decoder_of(model)
    parts = config.parts
    config.mod_layers = select_layers(len(decoder.layers), config.mod_n, config.mod_layers, parts)
    targets = {(layer, part): find_module(model, layer, part, parts[part]) for layer, part in config.targets}
    thresholds = config.thresholds(list(targets))
    for (layer, part), module in targets.items():
        mix_in(module, MIXINS[part])
        experts = module.num_experts if part == "expert" else 1
        module.mod_router = ModRouter(decoder.config.hidden_size, experts, device=device_of(module))
        module.mod_skip = skip_path(module, part, config, decoder.config.hidden_size)
        module.mod_layer, module.mod_level, module.mod_kv_policy = layer, parts[part], config.kv_policy
        module.mod_key = layer if len(parts) == 1 else (layer, part)
        module.mod_set_threshold(thresholds[layer, part])
        module.train(module.training)
    mix_in(decoder, RoutedDecoder)
    carry(decoder.modules())
    decoder.mod_config, decoder.mod_cache_plan = config, _cache_plan(config)
    decoder.mod_modules = list(targets.values())
    decoder.mod_deciding = min((layer for layer, part in targets if parts[part] == "sequence"), default=None)


def _cache_plan(config: ModConfig) -> dict[int, type[HeldDecisions] | None]:
    """What the cache's layers become; None for one that stays plain but must be of a kind that routing can fill."""
    plan: dict[int, type[HeldDecisions] | None] = {}
    for layer, part in config.targets:
        attends, level = part in ("attn", "block"), config.parts[part]
        if attends and level == "token" and config.kv_policy == "drop":
            plan[layer] = RaggedCacheLayer
        elif level == "sequence" and plan.get(layer) is None:
            plan[layer] = RowCacheLayer
        elif attends:
            plan.setdefault(layer)
    return plan


def skip_path(module: nn.Module, part: str, config: ModConfig, hidden_size: int) -> SkipPath | None:
    """The skip path that ``config`` asks for, at zero.

    The experts of a layer have none: a token that one expert skips keeps its other experts' update, and a path for
    each expert would be a large model fitted on few tokens.
    """
    if config.skip == "zero" or part == "expert":
        return None
    return SkipPath(hidden_size, config.skip_rank if config.skip == "low_rank" else 0, device_of(module))


def uninstall(model: PreTrainedModel) -> None:
    """Give every routed module its own class back and delete its router."""
    decoder = decoder_of(model)
    carry(decoder.modules(), back=True)
    for module in list(decoder.modules()):
        if hasattr(module, "mod_mixture"):
            mix_out(module)
    for module in decoder.modules():
        for name in [name for name in (*vars(module), *module._modules) if name.startswith("mod_")]:
            delattr(module, name)
