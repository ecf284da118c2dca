"""Where transformers' decoders have what can be routed: layers, attention, MLP and experts, by their names."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from .packing import check_packable

WHERE = {"attn": ("self_attn",), "mlp": ("mlp",), "block": (), "expert": ("mlp", "experts")}


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder with ``layers``; ValueError naming the missing module for other architectures."""
    decoder = getattr(model, model.base_model_prefix, model)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(f"{type(model).__name__} cannot be routed: its decoder has no 'layers'")
    return decoder


def find_module(model: PreTrainedModel, layer: int, part: str, level: str) -> nn.Module:
    """The module that a part of a layer names; ValueError naming the missing module."""
    found = module = decoder_of(model).layers[layer]
    what = f"layer {layer} of {type(model).__name__} cannot be routed as {part!r}"
    for name in WHERE[part] or ("self_attn",):  # of a block, which holds one
        if not isinstance(getattr(module, name, None), nn.Module):
            raise ValueError(f"{what}: it has no {name!r}")
        module = getattr(module, name)
    if part == "expert" and not isinstance(getattr(module, "num_experts", None), int):
        raise ValueError(f"{what}: its experts have no 'num_experts'")
    if part in ("attn", "block") and level == "token":
        check_packable(module, layer)
    return module if WHERE[part] else found


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: with accelerate's offloading its weights lie on the meta device between passes."""
    device = next(module.parameters()).device
    if device.type == "meta":
        for child in module.modules():
            hook = getattr(child, "_hf_hook", None)
            for single in getattr(hook, "hooks", [hook]):
                if getattr(single, "execution_device", None) is not None:
                    return torch.device(single.execution_device)
    return device
