"""Which base a set of routers belongs to: sizes, and a few values of its weights that survive a change of dtype."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError
from .seams import decoder_of

_PROBES = 16


def base_identity(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another, whatever its dtype: sizes, and a few embedding and norm values."""
    causal = causal_lm(model)
    config, decoder = causal.config, decoder_of(causal)
    embedding = causal.get_input_embeddings().weight.detach()
    probes = None
    if embedding.device.type != "meta" and embedding.dim() == 2 and embedding.shape[0] > 3:
        norm = decoder.norm.weight.detach().flatten() if hasattr(decoder, "norm") else embedding[3]
        row = embedding[3]
        probes = [round(float(v), 6) for v in torch.cat([row[:_PROBES].float().cpu(), norm[:_PROBES].float().cpu()])]
    return {
        "model_type": config.model_type.removesuffix("_mod"),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "name_or_path": getattr(config, "mod_base", None) or Path(config._name_or_path or "").name,
        "probes": probes,
    }


def check_base(model: nn.Module, saved: Any, where: Path) -> None:
    """UserError unless ``model`` is the base whose identity ``saved`` is, read from the file ``where``."""
    if not isinstance(saved, dict):
        raise UserError(f"{where}: the base that these routers belong to is not recorded; save them anew")
    here, name = base_identity(model), str(saved.get("name_or_path") or "")[:100]
    for field in ("model_type", "num_hidden_layers", "hidden_size"):
        if saved.get(field) != here[field]:
            raise UserError(
                f"{where}: these routers were trained on a base with {field} {saved.get(field)!r:.100}, this one has "
                f"{here[field]!r}: load them on {name or 'their own base'}"
            )
    theirs, ours = saved.get("probes"), here["probes"]
    if theirs is None or ours is None:
        return
    if (
        not isinstance(theirs, list)
        or len(theirs) != len(ours)
        or not all(isinstance(v, (int, float)) for v in theirs)
    ):
        raise UserError(f"{where}: the probes of the base are damaged; save the routers anew")
    if not all(math.isclose(a, b, rel_tol=2e-2, abs_tol=1e-4) for a, b in zip(theirs, ours, strict=True)):
        raise UserError(
            f"{where}: the base has other weights than the one these routers were trained on ({name or 'unnamed'}): "
            "load them on their own base"
        )


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside wrappers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model")
