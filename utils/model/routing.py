"""``route`` and ``unroute``: make any loaded causal LM dynamic in place, and take it back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .class_swap import mix_in, mix_out
from .configuration_mod import ModConfig, own_config
from .installing import install, uninstall
from .modeling_mod import ModPreTrained
from .recording import routed_base
from .registry import publish
from .routed import Routed
from .routed_model import prompt_length_from
from .trial import accept


def is_routed(model: nn.Module) -> bool:
    """Whether ``model`` (or what it wraps) has routed layers."""
    return any(getattr(module, "is_routed_decoder", False) for module in model.modules())


def route(model: PreTrainedModel, mod_n: int | None = None, **options: Any) -> PreTrainedModel:
    """Route a dense causal LM in place.

    Routers start at zero: at τ ≤ 0.5 the routed model computes exactly what the dense one does.

    Args:
        mod_n: how many layers are routed, from the deepest but one. options: fields of :class:`ModConfig`, such as
            ``granularity`` and ``skip``.

    Returns:
        The same object.

    Raises:
        ValueError: if the model is routed already, an argument is out of range, or a short trial on the model shows
            that it cannot be routed so (:mod:`trial`). The model is then as it was.
    """
    if is_routed(model):
        raise ValueError("this model is routed already: unroute(model) before routing it anew")
    config = ModConfig(mod_n, **options)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"route() takes a transformers model, not {type(model).__name__}: route before wrapping it")
    try:
        install(model, config)
        accept(model)
    except BaseException:
        uninstall(model)
        raise
    if not hasattr(model, "mod_mixture"):
        mix_in(model, ModPreTrained)
    own_config(model, routed=True)
    config.write_to(model.config)
    # peft notes it as the base of an adapter: one on this model must not come back on the dense one without a word.
    model.name_or_path = f"{model.name_or_path}, routed in memory: save_pretrained it, load adapters onto that folder"
    publish(type(model.config), type(model))
    return model


def unroute(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model again, in place; base weights are untouched. ValueError if it is not routed, or wrapped."""
    routed_base(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"unroute() takes the transformers model inside this {type(model).__name__}: unwrap it first")
    uninstall(model)
    if hasattr(model, "mod_mixture"):  # a bare decoder is plain again already
        mix_out(model)
    own_config(model, routed=False)
    model.name_or_path = model.config.name_or_path
    return model


def routed_modules(model: nn.Module) -> dict[str, Routed]:
    """Routed modules by router name ``"<layer>.<part>"``, in the order in which they run."""
    found = [m for m in routed_base(model).modules() if isinstance(getattr(m, "mod_router", None), nn.Module)]
    order = {"block": 0, "attn": 1, "mlp": 2, "expert": 3}
    found.sort(key=lambda module: (module.mod_layer, order[module.mod_part]))
    return {f"{module.mod_layer}.{module.mod_part}": module for module in found}


def run_decoder(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One pass without a cache, and without the output matrix, for what the routed modules see on the way.

    Args:
        batch: inputs of the model's forward; ``labels`` say where prompts end, as they do there.
    """
    decoder = routed_base(model)
    inputs = {name: v.to(decoder.device) if isinstance(v, Tensor) else v for name, v in batch.items()}
    labels = inputs.pop("labels", None)
    if labels is not None and decoder.mod_config.router_pooling == "prompt":
        inputs.setdefault("prompt_length", prompt_length_from(labels, inputs.get("attention_mask")))
    decoder(**inputs, use_cache=False)


def set_thresholds(model: nn.Module, threshold: float | dict[str, float]) -> None:
    """Set τ of every router: one number, or one per router name ``"<layer>.<part>"``; kept in the model's config."""
    base = routed_base(model)
    checked = ModConfig(**{**vars(base.mod_config), "threshold": threshold})
    modules = routed_modules(model)
    thresholds = checked.thresholds([(module.mod_layer, module.mod_part) for module in modules.values()])
    for module in modules.values():
        module.mod_set_threshold(thresholds[module.mod_layer, module.mod_part])
    base.mod_config.threshold = threshold
    base.config.mod_threshold = threshold
