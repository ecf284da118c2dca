"""transformers' registries: with this package imported, a routed checkpoint of any family loads as what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .class_swap import mixed
from .configuration_mod import ModFields
from .modeling_mod import routed_class

TASKS = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


PLAIN = type(CONFIG_MAPPING)(CONFIG_MAPPING_NAMES)
"""The configurations of transformers itself."""


class _Headless:
    """What ``AutoModel`` finds for a routed configuration: the decoder of its causal LM, which is routed."""

    config_class = PretrainedConfig

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(*args, **kwargs).base_model

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_config(config, **kwargs).base_model


class _Documentation:
    """A family's own docstring, read when it is asked for: its models take the name of a checkpoint from there."""

    def __get__(self, instance: Any, family: type[_Family]) -> str | None:
        return PLAIN[family.model_type.removesuffix("_mod")].__doc__


class _Family:
    """What ``AutoConfig`` finds for a family: its configuration, with routing where the fields name routed layers.

    It is made when it is asked for: families are many, and slow to import.
    """

    model_type: str

    def __new__(cls, **fields: Any) -> PretrainedConfig:
        return cls._for(fields)(**fields)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        return cls._for(config_dict).from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._for(PretrainedConfig.get_config_dict(*args, **kwargs)[0]).from_pretrained(*args, **kwargs)

    @classmethod
    def _for(cls, fields: Mapping[str, Any]) -> type[PretrainedConfig]:
        plain = PLAIN[cls.model_type.removesuffix("_mod")]
        if cls.model_type in PLAIN and not fields.get("mod_layers"):
            return plain
        routed = mixed(ModFields, plain)
        for auto in TASKS:
            if plain in auto._model_mapping:
                publish(routed, routed_class(auto._model_mapping[plain]))
        return routed


def publish(config: type[PretrainedConfig], model: type[PreTrainedModel]) -> None:
    """Make a routed class known to ``AutoConfig`` and to the automatic class of its task."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel._model_mapping.register(config, _Headless, exist_ok=True)
    for auto in TASKS:
        if auto.__name__ == model._auto_class:
            auto._model_mapping.register(config, model, exist_ok=True)


def defer() -> None:
    """Make all families known, importing none: by their own names, and by those that routed ones once had.

    A family's own entry seems to be of transformers, or ``AutoConfig`` would prefer it to the code that a checkpoint
    of somebody else's brings along.
    """
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for name, module in ((family, f"transformers.models.{family}"), (f"{family}_mod", __name__)):
            told = {"model_type": name, "__module__": module, "__doc__": _Documentation()}
            entry = type(name, (_Family,), told)
            AutoConfig.register(name, entry, exist_ok=True)
