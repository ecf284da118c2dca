"""What a base checkpoint says of itself, read without loading it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from router_tuning.checkpoint.links import weight_map
from router_tuning.errors import UserError

PROBES = 16  # values of each probe, as router_tuning.model.saving.base_identity takes them from a loaded model


def dense_config(base: Path) -> PretrainedConfig:
    """Configuration of the base as its plain family, without routing fields."""
    path = base / "config.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the folder of the base checkpoint")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.pop("model_type").removesuffix("_mod")
        fields.pop("auto_map", None)
        plain = {key: value for key, value in fields.items() if not key.startswith("mod_")}
        return AutoConfig.for_model(kind, **plain)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a configuration that transformers knows ({error})") from None


def base_probes(base: Path) -> list[float] | None:
    """The values by which :func:`router_tuning.model.saving.base_identity` tells bases apart, read from the shards."""
    files = weight_map(base)
    embedding = next((name for name in files if name.endswith("embed_tokens.weight")), None)
    norm = next((name for name in files if re.search(r"(^|model\.)norm\.weight$", name)), None)
    if embedding is None or norm is None:
        return None
    with safe_open(files[embedding], framework="pt") as file:
        row = file.get_slice(embedding)[3:4].flatten()[:PROBES]
    with safe_open(files[norm], framework="pt") as file:
        scale = file.get_tensor(norm).flatten()[:PROBES]
    return [round(float(value), 6) for value in torch.cat([row.float(), scale.float()])]
