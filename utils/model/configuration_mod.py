"""Which modules are routed, at which level, and how a decision is taken (paper section 3; published knobs)."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from .class_swap import mixed, plain_class

GRANULARITIES = (
    "attn_sequence",
    "attn_token",
    "mlp_sequence",
    "mlp_token",
    "block_sequence",
    "block_token",
    "expert_token",
)
Layers = list[int] | Mapping[str, list[int]]
POOLINGS = ("sequence", "prompt")
KV_POLICIES = ("keep", "drop")
SKIP_PATHS = ("zero", "mean", "low_rank")


def parse_granularity(granularity: str) -> dict[str, str]:
    """Split ``"attn_token+mlp_token"`` into ``{"attn": "token", "mlp": "token"}``; refuse what cannot combine."""
    return dict(_parts_of(str(granularity)))


@functools.cache
def _parts_of(granularity: str) -> Mapping[str, str]:
    parts: dict[str, str] = {}
    for name in granularity.split("+"):
        if name not in GRANULARITIES:
            raise ValueError(
                f"granularity {granularity!r}: {name!r} is not one of {', '.join(GRANULARITIES)} (combine with '+')"
            )
        part, level = name.split("_")
        if part in parts:
            raise ValueError(f"granularity {granularity!r} routes {part!r} twice; name each part once")
        parts[part] = level
    if "block" in parts and len(parts) > 1:
        raise ValueError(f"granularity {granularity!r}: a block already holds attention and MLP; route it alone")
    if "expert" in parts and "mlp" in parts:
        raise ValueError(f"granularity {granularity!r}: experts live inside the MLP; route one of the two")
    return parts


def select_layers(
    num_layers: int, mod_n: int | None, mod_layers: Layers | None, parts: Iterable[str] = ()
) -> list[int] | dict[str, list[int]]:
    """The routed layers: those listed, for each part where parts differ, or the deepest ``mod_n`` except the last."""
    if isinstance(mod_layers, Mapping):
        if set(mod_layers) != set(parts):
            raise ValueError(
                f"mod_layers names {', '.join(map(str, mod_layers))}; the granularity routes {', '.join(parts)}"
            )
        by_part = {part: select_layers(num_layers, None, mod_layers[part]) for part in parts}
        first, *others = by_part.values()
        return by_part if any(layers != first for layers in others) else first
    if mod_layers is not None:
        whole = isinstance(mod_layers, Iterable) and all(type(layer) is int for layer in mod_layers)
        layers = sorted(mod_layers) if whole else []
        if len(set(layers)) != len(layers) or not layers or layers[0] < 0 or layers[-1] >= num_layers:
            raise ValueError(f"mod_layers {mod_layers!r} must be distinct indices in 0…{num_layers - 1}")
        return layers
    if mod_n is None:
        raise ValueError("name the routed layers: mod_n (how many) or mod_layers (which)")
    if not 1 <= mod_n < num_layers:
        raise ValueError(f"mod_n {mod_n} must lie in 1…{num_layers - 1}: the model has {num_layers} layers")
    return list(range(num_layers - 1 - mod_n, num_layers - 1))


@dataclass
class ModConfig:
    """Everything that turns a dense decoder into a routed one.

    Args:
        mod_n: how many layers are routed, counted from the deepest but one (``mindskip_n`` is its published alias).
        mod_layers: the routed layers by index, or ``{part: indices}`` where parts differ; overrides ``mod_n``.
        granularity: one of :data:`GRANULARITIES`, or several joined with ``+`` (a router each).
        threshold: τ of ``m = 1[σ(W·h) ≥ τ]``: one number, or ``{"<layer>.<part>": τ}`` with one per router.
        router_pooling: at sequence level, mean over the whole ``sequence`` seen (published) or over the ``prompt``.
        kv_policy: at token level, whether a skipped token offers its key and value (``keep``) or not (``drop``).
        skip: what a skipped row or token gets: ``zero`` (published), the ``mean`` of what the module gives, or a
            ``low_rank`` affine map of its input (``skip_rank``). Except with ``zero``, the first token of a sequence
            always runs. Single experts always leave zero.
        target_capacity, gradient_scale: ``target`` and ``λ`` of the training loss.

    Raises:
        ValueError: naming the field, the bad value and the fix.
    """

    mod_n: int | None = None
    mod_layers: Layers | None = None
    granularity: str = "attn_sequence"
    threshold: float | dict[str, float] = 0.5
    router_pooling: str = "sequence"
    kv_policy: str = "keep"
    skip: str = "zero"
    skip_rank: int = 32
    target_capacity: float = 0.5
    gradient_scale: float = 0.0

    def __post_init__(self) -> None:
        parse_granularity(self.granularity)
        thresholds = self.threshold.values() if isinstance(self.threshold, Mapping) else [self.threshold]
        if not all(_is_number(t) and 0 <= t <= 1 for t in thresholds):
            raise ValueError(f"threshold {self.threshold!r} must lie in [0, 1]")
        if self.router_pooling not in POOLINGS:
            raise ValueError(f"router_pooling {self.router_pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.kv_policy not in KV_POLICIES:
            raise ValueError(f"kv_policy {self.kv_policy!r} is not one of {', '.join(KV_POLICIES)}")
        if self.skip not in SKIP_PATHS:
            raise ValueError(f"skip {self.skip!r} is not one of {', '.join(SKIP_PATHS)}")
        if type(self.skip_rank) is not int or self.skip_rank < 1:
            raise ValueError(f"skip_rank {self.skip_rank!r} must be a whole number, 1 or more")
        if self.skip != "zero" and set(self.parts) == {"expert"}:
            raise ValueError(f"skip {self.skip!r}: single experts have no skip path; leave skip at 'zero'")
        if not (_is_number(self.target_capacity) and 0 <= self.target_capacity <= 1):
            raise ValueError(f"target_capacity {self.target_capacity!r} must lie in [0, 1]")
        if not (_is_number(self.gradient_scale) and math.isfinite(self.gradient_scale)):
            raise ValueError(f"gradient_scale {self.gradient_scale!r} must be a finite number")

    @property
    def parts(self) -> Mapping[str, str]:
        """``{part: level}`` of the granularity."""
        return _parts_of(self.granularity)

    def layers_of(self, part: str) -> list[int]:
        """The layers in which ``part`` is routed, once they are selected."""
        return self.mod_layers[part] if isinstance(self.mod_layers, Mapping) else self.mod_layers

    @property
    def targets(self) -> list[tuple[int, str]]:
        """``(layer, part)`` of every router, shallowest first."""
        return sorted(
            ((layer, part) for part in self.parts for layer in self.layers_of(part)), key=lambda target: target[0]
        )

    @property
    def layers(self) -> list[int]:
        """Every layer that has a router."""
        return sorted({layer for layer, _ in self.targets})

    def thresholds(self, routers: list[tuple[int, str]]) -> dict[tuple[int, str], float]:
        """τ of each router ``(layer, part)``; ValueError unless a mapping names exactly these routers."""
        if not isinstance(self.threshold, Mapping):
            return dict.fromkeys(routers, float(self.threshold))
        names = {f"{layer}.{part}": (layer, part) for layer, part in routers}
        if set(self.threshold) != set(names):
            odd = sorted(map(str, set(self.threshold) ^ set(names)))
            raise ValueError(f"threshold must name every router and no other: {', '.join(odd[:4])}")
        return {router: float(self.threshold[name]) for name, router in names.items()}

    def write_to(self, config: PretrainedConfig) -> None:
        """Store the routing fields on a model's config as ``mod_*``."""
        for name, value in self.to_fields().items():
            setattr(config, name, value)

    def to_fields(self) -> dict[str, Any]:
        """The routing fields by the names under which a model's ``config.json`` holds them."""
        return {_field_name(f.name): getattr(self, f.name) for f in fields(self) if f.name != "mod_n"}

    @classmethod
    def read_from(cls, config: PretrainedConfig) -> ModConfig | None:
        """The routing fields of a model's config, or None for a config that names no routed layers."""
        if not getattr(config, "mod_layers", None):
            return None
        names = {f.name: _field_name(f.name) for f in fields(cls) if f.name != "mod_n"}
        return cls(
            **{name: getattr(config, key) for name, key in names.items() if getattr(config, key, None) is not None}
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _field_name(name: str) -> str:
    return name if name.startswith("mod_") else f"mod_{name}"


GUARD = "transformers_weights"
"""The field of a configuration that names the file of its weights. In that of a routed model it names none, so that
classes which know nothing of routing refuse the weights instead of loading them as a dense model's."""


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.json`` without what makes it a routed model's."""
    ours = ("model_type", "auto_map", GUARD)
    return {name: value for name, value in fields.items() if name not in ours and not name.startswith("mod_")}


class ModFields:
    """Mixin for a family's configuration: the routing fields; one without ``mod_layers`` is of a dense model.

    Each is an attribute, with the default of :class:`ModConfig`. What is written names the family's own
    ``model_type``, by which tokenizers and other tools know what to do.
    """

    @classmethod
    def mod_names(cls, plain: type[PretrainedConfig]) -> dict[str, Any]:
        """``LlamaConfig`` → ``LlamaModConfig``, of type ``llama_mod``; its code travels with what it saves."""
        name = f"{plain.__name__.removesuffix('Config')}ModConfig"
        names = {"__name__": name, "__qualname__": name, "__module__": __name__}
        return names | {"model_type": f"{plain.model_type}_mod", "_auto_class": "AutoConfig"}

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a file says, of this class's type."""
        fields, others = super().get_config_dict(*args, **kwargs)
        return fields | {"model_type": cls.model_type}, others

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """As of any configuration."""
        fields = {name: value for name, value in config_dict.items() if name not in ("model_type", GUARD)}
        return super().from_dict(fields, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds; with routed layers, weights are only for those who can route them.

        Where the code travels along, the automatic class is the first architecture: servers take a class of
        transformers by that name, which then finds the code.
        """
        fields = super().to_diff_dict()
        if self.mod_layers:
            automatic = [name for name in fields.get("auto_map") or () if name.startswith("AutoModel")]
            own = [name for name in fields.get("architectures") or () if name not in automatic]
            if automatic:
                fields["architectures"] = automatic + own
            fields["model_type"] = self.model_type.removesuffix("_mod")
            fields[GUARD] = "those of a routed model: pass trust_remote_code=True, or import router_tuning.model"
        return fields


for _name, _default in ModConfig().to_fields().items():
    setattr(ModFields, _name, _default)


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration in its family's own class, with the routing fields that it has."""
    config = copy.deepcopy(config)
    config.__class__ = plain_class(config)
    return config


def own_config(model: PreTrainedModel, routed: bool) -> None:
    """Give ``model`` a configuration that no other model shares, with routing fields or without them."""
    copies: dict[int, Any] = {}
    config = copy.deepcopy(model.config, copies)
    if routed != hasattr(config, "mod_mixture"):  # loaded as remote code, the mixin is another object
        config.__class__ = mixed(ModFields, type(config)) if routed else plain_class(config)
    for name in [] if routed else list(vars(config)):
        if name.startswith("mod_") or name == "auto_map":
            delattr(config, name)
    for module in model.modules():
        if id(vars(module).get("config")) in copies:
            module.config = copies[id(module.config)]


def __getattr__(name: str) -> type[PretrainedConfig]:
    """``XModConfig`` of any family of transformers."""
    plain = getattr(transformers, f"{name.removesuffix('ModConfig')}Config", None)
    if plain is None or not name.endswith("ModConfig"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return mixed(ModFields, plain)
