"""Which base a set of routers belongs to: sizes, and a few values of its weights that survive a change of dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from .modules import decoder_of

_PROBES = 16
ReadRows = Callable[[str, slice], Tensor | None]


def base_fingerprint(model: nn.Module, read: ReadRows | None = None) -> dict[str, Any]:
    """What tells one base from another, whatever its dtype: sizes, and a few embedding and norm values.

    Args:
        read: rows of a weight by its name, where the model's own hold no values (meta device).
    """
    causal = causal_lm(model)
    config = causal.config
    return {
        "model_type": config.model_type.removesuffix("_mod"),
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "name_or_path": getattr(config, "mod_base", None) or Path(config._name_or_path or "").name,
        "probes": _probes(causal, read),
    }


def _probes(causal: PreTrainedModel, read: ReadRows | None) -> list[float] | None:
    """The first values of the fourth embedding and of the last norm; None where they cannot be had."""
    embedding, decoder = causal.get_input_embeddings().weight, decoder_of(causal)
    names = {id(parameter): name for name, parameter in causal.named_parameters()}
    if embedding.dim() != 2 or embedding.shape[0] <= 3:
        return None
    probed, found = [(embedding, slice(3, 4))], []
    probed.append((decoder.norm.weight, slice(None)) if hasattr(decoder, "norm") else probed[0])
    for weight, rows in probed:
        values = read(names[id(weight)], rows) if read else weight.detach()[rows]
        if values is None or values.is_meta:
            return None
        found.append(values.flatten()[:_PROBES].float().cpu())
    return [round(float(value), 6) for value in torch.cat(found)]


def check_base(model: nn.Module, saved: Any, where: Path, read: ReadRows | None = None) -> None:
    """UserError unless ``model`` is the base whose fingerprint ``saved`` is, read from the file ``where``."""
    if not isinstance(saved, dict):
        raise UserError(f"{where}: the base that these routers belong to is not recorded; save them anew")
    here, name = base_fingerprint(model, read), str(saved.get("name_or_path") or "")[:100]
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
