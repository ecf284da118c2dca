"""What a base checkpoint says of itself, read without loading it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from router_tuning.checkpoint.shards import read_rows, weight_map
from router_tuning.errors import UserError
from router_tuning.model import ModConfig
from router_tuning.model.configuration_mod import plain_fields, select_layers


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's ``config.json``; UserError if it is missing or damaged."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name the folder of a checkpoint") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no JSON object")
    return fields


def dense_config(folder: Path) -> PretrainedConfig:
    """Configuration of the base as its plain family, without routing fields."""
    fields = read_config(folder)
    kind = str(fields.get("model_type")).removesuffix("_mod")
    plain = plain_fields(fields)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{folder / 'config.json'}: transformers has no causal language model of type {kind!r}")
    try:
        return AutoConfig.for_model(kind, **plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is no configuration of a {kind} model ({reason})") from None


def routed_fields(base: PretrainedConfig, hub_id: str | None = None) -> dict[str, Any]:
    """Fields of a ``config.json`` for a base, with its deepest half routed.

    Args:
        hub_id: where the base's weights can be had again, kept as ``mod_base``.

    Raises:
        UserError: for a base of a single layer.
    """
    layers = base.get_text_config().num_hidden_layers
    try:
        routing = ModConfig(mod_layers=select_layers(layers, layers // 2, None))
    except ValueError as error:
        raise UserError(f"this base cannot be routed: {error}") from None
    unused = ("transformers_version", "_name_or_path")
    plain = {name: value for name, value in base.to_diff_dict().items() if name not in unused}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type].replace("ForCausalLM", "ModForCausalLM")
    named = {"model_type": f"{base.model_type}_mod", "architectures": [architecture]}
    return plain | routing.to_fields() | named | ({"mod_base": hub_id} if hub_id else {})


def skeleton(base: Path) -> PreTrainedModel:
    """The dense model without memory for its weights (meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(dense_config(base))


def row_reader(base: Path) -> Callable[[str, slice], Tensor | None]:
    """Rows of a weight by its name, from the shards; None for a name that they lack."""
    files = weight_map(base)
    return lambda name, rows: read_rows(files, name, rows) if name in files else None
