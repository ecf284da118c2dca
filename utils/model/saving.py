"""Routers on disk: ``router.safetensors`` (weights) and ``router_config.json`` (what they route, and on what)."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from .configuration_mod import ModConfig
from .recording import routed_base
from .routing import is_routed, route, routed_modules, set_thresholds
from .seams import WHERE, decoder_of

WEIGHTS_NAME = "router.safetensors"
CONFIG_NAME = "router_config.json"
FORMAT = 1
_PROBES = 16


def router_names(model: nn.Module) -> dict[str, str]:
    """Router name ``"<layer>.<part>"`` → the name of its weight in a checkpoint of the routed model."""
    causal = _causal_lm(model)
    prefix = f"{causal.base_model_prefix}." if decoder_of(causal) is not causal else ""
    names = {}
    for key in routed_modules(causal):
        layer, part = key.split(".")
        names[key] = ".".join([f"{prefix}layers.{layer}", *WHERE[part], "mod_router", "weight"])
    return names


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """Router weights, float32 on the CPU, by their names in a checkpoint; sees through peft's wrappers."""
    names, state = router_names(model), {}
    for key, module in routed_modules(model).items():
        weights = [p for n, p in module.mod_router.named_parameters() if "original_module" not in n]
        state[names[key]] = weights[0].detach().float().cpu().contiguous()
    return state


def save_routers(
    model: nn.Module,
    folder: str | os.PathLike,
    state: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``router.safetensors`` and ``router_config.json``; each file appears whole or not at all.

    Args:
        state: the weights, where the caller has gathered them from shards; else they are read from the model.
        extra: further entries of the configuration (calibration, provenance), JSON-serialisable; ``base`` is the
            identity of the base, needed where the model's own weights lie in shards.
    """
    folder, extra = Path(folder), dict(extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    state = (
        router_state(model) if state is None else {k: v.detach().float().cpu().contiguous() for k, v in state.items()}
    )
    expected = set(router_names(model).values())
    if set(state) != expected:
        raise UserError(f"router weights {sorted(set(state) ^ expected)} do not belong to this model")
    base = routed_base(model)
    identity = extra.pop("base", None) or base_identity(model)
    config = {"format": FORMAT, **base.mod_config.to_fields(), "base": identity, **extra}
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n"))
    return folder


def load_routers(model: PreTrainedModel, folder: str | os.PathLike, capacity: float | None = None) -> PreTrainedModel:
    """Load saved routers into ``model``, which is routed first if it is dense.

    Args:
        capacity: set the thresholds so that this share of the routed work runs, from the stored calibration.

    Raises:
        UserError: one line that names the file and what is wrong: missing, not safetensors, other keys or shapes,
            values that are not finite, another base, a routing that differs from the model's.
    """
    folder = Path(folder)
    config, state = read_router_config(folder), read_router_weights(folder)
    _check_base(model, config.get("base") or {}, folder)
    routing = _routing_of(config, folder)
    if not is_routed(model):
        fields = {k: v for k, v in vars(routing).items() if k != "mod_n"}
        try:
            route(model, **fields)
        except ValueError as error:
            raise UserError(f"{folder / CONFIG_NAME}: {error}") from None
    else:
        _check_routing(model, routing, folder)
        set_thresholds(model, routing.threshold)
    names, modules = router_names(model), routed_modules(model)
    if set(state) != set(names.values()):
        odd = sorted(set(state) ^ set(names.values()))
        raise UserError(
            f"{folder / WEIGHTS_NAME}: router weights do not match the routed layers: {', '.join(odd[:4])}"
        )
    for key, module in modules.items():
        saved, weight = state[names[key]], module.mod_router.weight
        if saved.shape != weight.shape:
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {names[key]} has shape {tuple(saved.shape)}, the model needs "
                f"{tuple(weight.shape)}: these routers belong to another base"
            )
        if not bool(torch.isfinite(saved).all()):
            raise UserError(f"{folder / WEIGHTS_NAME}: {names[key]} holds values that are not finite; save it anew")
    with torch.no_grad():
        for key, module in modules.items():
            module.mod_router.weight.copy_(state[names[key]])
    if capacity is not None:
        set_thresholds(model, thresholds_for(config, capacity, folder))
    return model


def read_router_config(folder: Path) -> dict[str, Any]:
    """The parsed ``router_config.json``; UserError if it is missing or not ours."""
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder that save_routers or a tuning run wrote")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: not a router configuration of format {FORMAT}")
    return config


def read_router_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``router.safetensors``; UserError if it is missing or damaged."""
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder that save_routers or a tuning run wrote")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from None


def thresholds_for(config: dict[str, Any], capacity: float, where: Path | str) -> dict[str, float]:
    """Per-router thresholds for a budget, interpolated in the stored calibration (logits by budget)."""
    if not 0 <= capacity <= 1:
        raise UserError(f"capacity {capacity} must lie in [0, 1]")
    dial = config.get("dial")
    if not dial:
        raise UserError(f"{where}: these routers store no calibration; calibrate them before asking for a capacity")
    grid, table = dial["capacity"], dial["logit"]
    if capacity <= grid[0] or capacity >= grid[-1]:
        edge = 1.0 if capacity <= 0 else 0.0 if capacity >= 1 else None
        if edge is not None:
            return {key: edge for key in table}
    upper = next((i for i, c in enumerate(grid) if c >= capacity), len(grid) - 1)
    lower = max(upper - 1, 0)
    span = grid[upper] - grid[lower]
    share = 0.0 if span == 0 else (capacity - grid[lower]) / span
    return {key: _sigmoid(row[lower] + share * (row[upper] - row[lower])) for key, row in table.items()}


def base_identity(model: nn.Module) -> dict[str, Any]:
    """What tells one base from another, whatever its dtype: sizes, and a few embedding and norm values."""
    causal = _causal_lm(model)
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


def _check_base(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    here = base_identity(model)
    for name in ("model_type", "num_hidden_layers", "hidden_size"):
        if saved.get(name) != here[name]:
            raise UserError(
                f"{folder / CONFIG_NAME}: these routers were trained on a base with {name} {saved.get(name)!r}, this "
                f"one has {here[name]!r}: load them on {saved.get('name_or_path') or 'their own base'}"
            )
    a, b = saved.get("probes"), here["probes"]
    if a and b and any(not math.isclose(x, y, rel_tol=2e-2, abs_tol=1e-4) for x, y in zip(a, b, strict=True)):
        raise UserError(
            f"{folder / CONFIG_NAME}: the base has other weights than the one these routers were trained on "
            f"({saved.get('name_or_path') or 'unnamed'}): load them on their own base"
        )


def _routing_of(config: dict[str, Any], folder: Path) -> ModConfig:
    fields = {name.removeprefix("mod_"): value for name, value in config.items() if name.startswith("mod_")}
    fields["mod_layers"] = fields.pop("layers", None)
    try:
        return ModConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}") from None


def _check_routing(model: nn.Module, saved: ModConfig, folder: Path) -> None:
    here = routed_base(model).mod_config
    for name in ("mod_layers", "granularity", "kv_policy", "router_pooling"):
        if getattr(here, name) != getattr(saved, name):
            raise UserError(
                f"{folder / CONFIG_NAME}: {name} is {getattr(saved, name)!r} there and {getattr(here, name)!r} on the "
                "model: unroute(model) first, or route it the same way"
            )


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers causal LM inside wrappers."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"{type(model).__name__} holds no transformers model")


def _replace(path: Path, write) -> None:
    """Write through a temporary name, then rename; the file gets ordinary permissions."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit)) if logit > -700 else 0.0
