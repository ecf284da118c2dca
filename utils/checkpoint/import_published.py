"""Routers saved by the published code (``model.layers.N.router.weight``) as a folder that ``load_routers`` reads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from router_tuning.bases.description import row_reader, skeleton
from router_tuning.bases.shards import tensor_names, weight_map
from router_tuning.errors import UserError
from router_tuning.files import new_folder
from router_tuning.model import route, save_routers
from router_tuning.model.fingerprint import base_fingerprint
from router_tuning.model.saving import CONFIG_NAME, router_names

PUBLISHED = re.compile(r"(?:^|\.)layers\.(\d+)\.router\.weight$")


def import_published(
    source: Path,
    base: Path,
    output: Path,
    granularity: str = "attn_sequence",
    threshold: float = 0.5,
    overwrite: bool = False,
) -> list[int]:
    """Write ``output`` with the routers of ``source`` and return the layers that they route.

    Args:
        source: a safetensors file, or a checkpoint folder, in which each routed layer has ``….layers.N.router.weight``
            of shape ``[1, hidden]``; everything else in it is ignored.
        base: folder of the base that they were trained on.
        granularity: of the published run; its checkpoints do not record it. One router per layer, so no combination.

    Raises :class:`UserError` for pickled weights, a source without such keys, wrong shapes or values, or routers that
    do not fit the base.
    """
    found = published_routers(source)
    layers = sorted(found)
    model = skeleton(base)
    try:
        with torch.device("meta"):
            route(model, mod_layers=layers, granularity=granularity, threshold=threshold)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    names = router_names(model)
    if len(names) != len(layers):
        raise UserError(f"--granularity {granularity}: published checkpoints hold one router per layer; name one part")
    state = {}
    for key, name in names.items():
        weight = found[int(key.split(".")[0])]
        if tuple(weight.shape) != (1, model.config.hidden_size) or not weight.isfinite().all():
            raise UserError(
                f"{source}: the router of layer {key.split('.')[0]} has shape {tuple(weight.shape)} where the base "
                f"needs (1, {model.config.hidden_size}), or values that are not finite"
            )
        state[name] = weight
    fingerprint = {**base_fingerprint(model, row_reader(base)), "name_or_path": base.name}
    with new_folder(output, overwrite, CONFIG_NAME) as staged:
        save_routers(model, staged, state=state, extra={"base": fingerprint, "imported_from": source.name})
    return layers


def published_routers(source: Path) -> dict[int, Tensor]:
    """``{layer: weight}`` of the published routers in a file or folder; :class:`UserError` if there are none."""
    if source.is_dir():
        files = weight_map(source)
    elif source.suffix == ".safetensors" and source.is_file():
        files = dict.fromkeys(tensor_names(source), source)
    else:
        raise UserError(f"{source}: not a .safetensors file or a folder with one; pickled weights are not read")
    found: dict[int, Tensor] = {}
    for name, path in files.items():
        match = PUBLISHED.search(name)
        if match is None:
            continue
        if int(match[1]) in found:
            raise UserError(
                f"{path}: layer {match[1]} has two routers; only one decoder per checkpoint can be imported"
            )
        with safe_open(path, framework="pt") as file:
            found[int(match[1])] = file.get_tensor(name).float()
    if not found:
        raise UserError(
            f"{source}: no key ends in layers.<N>.router.weight; were these routers saved by another code?"
        )
    return found
