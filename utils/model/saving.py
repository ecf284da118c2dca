"""Routers on disk: ``router.safetensors`` (weights) and ``router_config.json`` (what they route, and on what)."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..files import publish, write_text
from .configuration_mod import ModConfig
from .dial import logits_at
from .fingerprint import base_fingerprint, causal_lm, check_base
from .modules import WHERE, decoder_of
from .recording import routed_base
from .routing import is_routed, route, routed_modules, set_thresholds, unroute

WEIGHTS_NAME = "router.safetensors"
CONFIG_NAME = "router_config.json"
FORMAT = 1


def router_names(model: nn.Module) -> dict[str, str]:
    """Router name ``"<layer>.<part>"`` → the name of its weight in a checkpoint of the routed model."""
    causal = causal_lm(model)
    prefix = f"{causal.base_model_prefix}." if decoder_of(causal) is not causal else ""
    names = {}
    for key in routed_modules(causal):
        layer, part = key.split(".")
        names[key] = ".".join([f"{prefix}layers.{layer}", *WHERE[part], "mod_router", "weight"])
    return names


def router_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights of routers and skip paths, live, by their names in a checkpoint; sees through peft's wrappers."""
    names, tensors = router_names(model), {}
    for key, module in routed_modules(model).items():
        tensors[names[key]] = module.mod_router.weight
        stem = names[key].removesuffix("mod_router.weight")
        for name in ("bias", "down", "up"):
            tensor = getattr(module.mod_skip, name, None)
            if tensor is not None:
                tensors[f"{stem}mod_skip.{name}"] = tensor
    return tensors


def save_routers(
    model: nn.Module,
    folder: str | os.PathLike,
    state: dict[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write ``router.safetensors`` and ``router_config.json``; each file appears whole or not at all.

    Args:
        state: weights that the caller has gathered from shards; what is not among them is read from the model.
        extra: further entries of the configuration (calibration, provenance), JSON-serialisable; ``base`` is the
            fingerprint of the base, needed where the model's own weights lie in shards.
    """
    folder, extra = Path(folder), dict(extra or {})
    tensors, given = router_tensors(model), state or {}
    if not set(given) <= set(tensors):
        raise UserError(f"router weights {sorted(set(given) - set(tensors))} do not belong to this model")
    state = {name: t.detach().float().cpu().contiguous() for name, t in {**tensors, **given}.items()}
    base = extra.pop("base", None) or base_fingerprint(model)
    config = {"format": FORMAT, **routed_base(model).mod_config.to_fields(), "base": base, **extra}
    text = json.dumps(config, indent=2) + "\n"
    with publish(folder / WEIGHTS_NAME) as draft:
        save_file(state, draft, metadata={"format": "pt"})
    write_text(folder / CONFIG_NAME, text)
    return folder


def load_routers(
    model: PreTrainedModel, folder: str | os.PathLike, capacity: float | None = None, flops: float | None = None
) -> PreTrainedModel:
    """Load saved routers into ``model``, which is routed first if it is dense.

    Args:
        capacity: set the thresholds so that routed modules run for this share of rows or tokens on average, from the
            stored calibration. flops: instead, so that this share of the decoder's operations is left.

    Raises:
        UserError: one line that names the file and what is wrong: missing, not safetensors, other keys or shapes,
            values that are not finite, another base, a routing that differs from the model's. The model is then as
            it was before.
    """
    folder = Path(folder)
    config, state = read_router_config(folder), read_router_weights(folder)
    check_base(model, config.get("base"), folder / CONFIG_NAME)
    routing = _routing_of(config, folder)
    threshold = routing.threshold
    if capacity is not None or flops is not None:
        budget, axis = (capacity, "capacity") if flops is None else (flops, "flops")
        threshold = thresholds_for(config, budget, folder / CONFIG_NAME, axis)
    dense = not is_routed(model)
    if not dense:
        _check_routing(model, routing, folder)
    try:
        if dense:
            route(model, **{name: value for name, value in vars(routing).items() if name != "mod_n"})
        weights = _fitting(model, state, folder / WEIGHTS_NAME)
        set_thresholds(model, threshold)
    except ValueError as error:
        if dense and is_routed(model):
            unroute(model)
        raise error if isinstance(error, UserError) else UserError(f"{folder / CONFIG_NAME}: {error}") from None
    with torch.no_grad():
        for name, tensor in router_tensors(model).items():
            tensor.copy_(weights[name])
    return model


def _fitting(model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The saved weights; UserError unless they are exactly the model's, finite, and float."""
    tensors = router_tensors(model)
    if set(state) != set(tensors):
        odd = sorted(set(state) ^ set(tensors))
        raise UserError(f"{path}: router weights do not match the routed layers: {', '.join(odd)[:300]}")
    for name, tensor in tensors.items():
        saved, shape = state[name], tuple(tensor.shape)
        if tuple(saved.shape) != shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(saved.shape)}, the model needs {shape}: these routers belong "
                "to another base"
            )
        if not saved.is_floating_point() or not bool(torch.isfinite(saved).all()):
            raise UserError(f"{path}: {name} holds values that are no finite floats; save it anew")
    return state


def read_router_config(folder: Path) -> dict[str, Any]:
    """The parsed ``router_config.json``; UserError if it is missing or not ours."""
    path = _existing(folder, CONFIG_NAME)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path}: not a router configuration of format {FORMAT}")
    return config


def read_router_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``router.safetensors``; UserError if it is missing or damaged."""
    path = _existing(folder, WEIGHTS_NAME)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({error})") from None


def _existing(folder: Path, name: str) -> Path:
    path = Path(folder) / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a folder that save_routers or a tuning run wrote")
    return path


def thresholds_for(
    config: dict[str, Any], budget: float, where: Path | str, axis: str = "capacity"
) -> dict[str, float]:
    """Per-router thresholds for a budget, interpolated in the stored calibration (logits by budget).

    Args:
        axis: what ``budget`` is a share of: ``capacity`` (rows or tokens, mean over routers) or ``flops`` (of the
            decoder's operations).
    """
    if not 0 <= budget <= 1:
        raise UserError(f"{axis} {budget} must lie in [0, 1]")
    dial = config.get("dial")
    if not dial:
        raise UserError(f"{where}: these routers store no calibration; calibrate them before asking for a budget")
    try:
        grid, table = dial[axis], dial["logit"]
        if axis == "flops" and budget < grid[0]:
            raise UserError(f"{where}: flops {budget} is out of reach: {grid[0]:.3f} is left where all is skipped")
        if budget in (0, 1) and not grid[0] < budget < grid[-1]:
            return dict.fromkeys(table, 1.0 - budget)
        return {name: _sigmoid(logit) for name, logit in logits_at(dial, budget, axis).items()}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: the stored calibration is damaged ({error!r}); calibrate anew") from None


def _routing_of(config: dict[str, Any], folder: Path) -> ModConfig:
    fields = {name.removeprefix("mod_"): value for name, value in config.items() if name.startswith("mod_")}
    fields["mod_layers"] = fields.pop("layers", None)
    try:
        return ModConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_NAME}: {error}") from None


def _check_routing(model: nn.Module, saved: ModConfig, folder: Path) -> None:
    here = routed_base(model).mod_config
    for name in ("mod_layers", "granularity", "kv_policy", "router_pooling", "skip", "skip_rank"):
        if getattr(here, name) != getattr(saved, name):
            raise UserError(
                f"{folder / CONFIG_NAME}: {name} is {getattr(saved, name)!r} there and {getattr(here, name)!r} on the "
                "model: unroute(model) first, or route it the same way"
            )


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    return math.exp(logit) / (1 + math.exp(logit)) if logit > -700 else 0.0
