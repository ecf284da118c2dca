"""transformers' registries: with this package imported, a routed checkpoint of any family loads by its model type."""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_mod import ModFields
from .mixing import mixed
from .modeling_mod import routed_class

TASKS = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoModelForQuestionAnswering,
)


class _Deferred:
    """The routed configuration of a family, made when it is asked for: families are many, and slow to import."""

    model_type: str

    def __new__(cls, **fields: Any) -> PretrainedConfig:
        return cls._resolve()(**fields)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._resolve().from_dict(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._resolve().from_pretrained(*args, **kwargs)

    @classmethod
    def _resolve(cls) -> type[PretrainedConfig]:
        plain = CONFIG_MAPPING[cls.model_type.removesuffix("_mod")]
        routed = mixed(ModFields, plain)
        for auto in TASKS:
            if plain in auto._model_mapping:
                publish(routed, routed_class(auto._model_mapping[plain]))
        return routed


def publish(config: type[PretrainedConfig], model: type[PreTrainedModel]) -> None:
    """Make a routed class known to ``AutoConfig`` and to the automatic class of its task."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto in TASKS:
        if auto.__name__ == model._auto_class:
            auto._model_mapping.register(config, model, exist_ok=True)


def defer() -> None:
    """Make all families known, importing none."""
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        name = f"{family}_mod"
        AutoConfig.register(
            name, type(name, (_Deferred,), {"model_type": name, "__module__": __name__}), exist_ok=True
        )
