"""What a base checkpoint says of itself, read without loading it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from router_tuning.bases.shards import weight_map
from router_tuning.errors import UserError
from router_tuning.files import read_json
from router_tuning.model import ModConfig
from router_tuning.model.configuration_mod import plain_fields, select_layers

_PROBED = 1 << 20  # bytes read at either end of a weight file for its fingerprint


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's ``config.json``; UserError if it is missing or damaged."""
    return read_json(folder / "config.json")


def dense_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Configuration of the base as its plain family, without routing fields.

    Args:
        trust_remote_code: take the class that comes with a base which transformers does not know.
    """
    fields = read_config(folder)
    kind = str(fields.get("model_type")).removesuffix("_mod")
    try:
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return AutoConfig.for_model(kind, **plain_fields(fields))
        if trust_remote_code:
            return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / 'config.json'} is no configuration of a {kind} model ({reason})") from None
    raise UserError(f"{folder / 'config.json'}: transformers has no causal language model of type {kind!r}")


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
    named = {"model_type": base.model_type, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[base.model_type]]}
    return plain | routing.to_fields() | named | ({"mod_base": hub_id} if hub_id else {})


def skeleton(base: Path) -> PreTrainedModel:
    """The dense model without memory for its weights (meta device)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(dense_config(base))


def fingerprint(folder: Path) -> str:
    """What tells one base from another: its config, and the names, sizes and both ends of its weight files."""
    plain = {k: v for k, v in plain_fields(read_config(folder)).items() if not k.startswith("_")}
    plain.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(set(weight_map(folder).values())):
        size = path.stat().st_size
        digest.update(f"{path.name}{size}".encode())
        with open(path, "rb") as stream:
            digest.update(stream.read(_PROBED))
            stream.seek(max(0, size - _PROBED))
            digest.update(stream.read(_PROBED))
    return digest.hexdigest()[:16]
