"""Routed classes of all families: what ``route`` makes of a model, and what ``auto_map`` names in a checkpoint."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import logging

from .class_swap import mixed, plain_class
from .configuration_mod import GUARD, ModConfig, ModFields, own_config, plain_config
from .installing import install
from .routed_model import RoutedCausalLM
from .trial import postpone, try_at_first_use

logger = logging.get_logger(__name__)


class ModPreTrained(RoutedCausalLM):
    """Mixin for a causal LM: routes the layers that its configuration names, and brings its code with its weights."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        # A head builds its decoder by the family's configuration.
        super().__init__(plain_config(config), *args, **kwargs)
        own_config(self, routed=True)
        routing = ModConfig.read_from(self.config)
        if routing is not None:
            install(self, routing)
            routing.write_to(self.config)
            postpone(self)

    @classmethod
    def mod_names(cls, plain: type[PreTrainedModel]) -> dict[str, Any]:
        """``LlamaForCausalLM`` → ``LlamaModForCausalLM``, which loads what its family loads, routers in float32."""
        stem, _, task = plain.__name__.rpartition("For")
        name = f"{stem}ModFor{task}"
        _convert_alike(plain, name)
        return {
            "__name__": name,
            "__qualname__": name,
            "__module__": __name__,
            "config_class": mixed(ModFields, plain.config_class),
            "_auto_class": f"AutoModelFor{task}",
            "_keep_in_fp32_modules_strict": {
                *(plain._keep_in_fp32_modules_strict or ()),
                "mod_router",
                "mod_skip",
            },
            "_keys_to_ignore_on_load_missing": {
                *(plain._keys_to_ignore_on_load_missing or ()),
                r"mod_router|mod_skip",
            },
            # Both look into the source of the class's module.
            "_can_set_attn_implementation": plain._can_set_attn_implementation,
            "_can_set_experts_implementation": plain._can_set_experts_implementation,
        }

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of any model; routers that the checkpoint lacks start at zero, which one line says.

        Raises:
            ValueError: for a router or skip path that holds values which are not finite, or that would start at zero
                but is offloaded; for a model that cannot be routed so (:mod:`trial`).
        """
        if hasattr(kwargs.get("config"), GUARD):  # read by a class that knows nothing of routing
            delattr(kwargs["config"], GUARD)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = [name for name, module in model.named_modules() if vars(module).pop("mod_missing", False)]
        missing = [name for name in missing if not any(key.startswith(f"{name}.") for key in _offloaded(model))]
        if missing:
            if any(parameter.is_meta for name in missing for parameter in model.get_submodule(name).parameters()):
                raise ValueError(
                    f"{model.name_or_path}: no weights for {missing[0]}, which is offloaded: load it without "
                    "offloading, save_pretrained it, and load that"
                )
            logger.warning(
                f"{model.name_or_path}: no weights for {len(missing)} routers and skip paths ({missing[0]} … "
                f"{missing[-1]}), which start at zero"
            )
        for name, weight in model.named_parameters():
            if ("mod_router" in name or "mod_skip" in name) and not weight.is_meta and not weight.isfinite().all():
                raise ValueError(f"{model.name_or_path}: {name} holds values that are not finite; save it anew")
        for decoder in [module for module in model.modules() if getattr(module, "mod_untried", False)]:
            try_at_first_use(decoder)
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As of any model, with the code that loads it: ``AutoModelForCausalLM`` gives the same routed model.

        Raises:
            ValueError: where the checkpoint would come back without its routers.
        """
        plain = plain_class(self)
        if getattr(transformers, plain.__name__, None) is not plain or not hasattr(transformers, self._auto_class):
            raise ValueError(
                f"a routed {plain.__name__} is not saved whole, since no automatic class of transformers loads it: "
                "save_routers keeps what routing added, next to the base"
            )
        if getattr(self, "_hf_peft_config_loaded", False):
            raise ValueError(
                "with an adapter loaded, the adapter alone would be saved, without the routers: save_routers keeps "
                "these, and peft.get_peft_model(model, …).save_pretrained the adapter"
            )
        super().save_pretrained(save_directory, *args, **kwargs)


def _offloaded(model: PreTrainedModel) -> set[str]:
    """Names of the weights that accelerate holds elsewhere, and brings when their module runs."""
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    return {name for held in maps if held is not None for name in held}


def _convert_alike(plain: type[PreTrainedModel], name: str) -> None:
    """Checkpoints are converted on loading by class and by model type: by ours as by the family's."""
    kind = plain.config_class.model_type
    for theirs, ours in ((plain.__name__, name), (kind, f"{kind}_mod")):
        mapping = get_checkpoint_conversion_mapping(theirs)
        if mapping is not None:
            register_checkpoint_conversion_mapping(ours, mapping, overwrite=True)


def routed_class(plain: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The routed class of a family's."""
    return mixed(ModPreTrained, plain)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """``XModFor…`` of any family of transformers."""
    plain = getattr(transformers, name.replace("ModFor", "For"), None) if "ModFor" in name else None
    if plain is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return routed_class(plain)
