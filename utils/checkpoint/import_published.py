"""Routers saved by the published code (``model.layers.N.router.weight``) as a folder that ``load_routers`` reads."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from router_tuning.bases.description import skeleton
from router_tuning.bases.shards import row_reader, weight_map
from router_tuning.errors import UserError
from router_tuning.files import new_folder
from router_tuning.model import route, routed_modules, save_routers
from router_tuning.model.fingerprint import base_fingerprint
from router_tuning.model.saving import CONFIG_NAME, router_names
from router_tuning.tuning.run_folder import refuse_run

_PUBLISHED = re.compile(r"(?:^|\.)layers\.(\d+)\.router\.weight$")


def import_published(source: Path, base: Path, output: Path, granularity: str, overwrite: bool = False) -> list[int]:
    """Write ``output`` with the routers of ``source`` and return the layers that they route.

    Args:
        source: a checkpoint folder with safetensors, in which each routed layer has ``….layers.N.router.weight`` of
            shape ``[1, hidden]``; everything else in it is ignored.
        base: folder of the base that they were trained on.
        granularity: of the published run; its checkpoints do not record it. One router per layer, so no combination.

    Raises:
        UserError: for a source without such keys, wrong shapes or values, or routers that do not fit the base.
    """
    refuse_run(output)
    found = _routers(source)
    model = skeleton(base)
    try:
        with torch.device("meta"):
            route(model, mod_layers=sorted(found), granularity=granularity)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if len(routed_modules(model)) != len(found):
        raise UserError(f"--granularity {granularity}: published checkpoints hold one router per layer; name one part")
    state, shape = {}, (1, model.config.hidden_size)
    for key, name in router_names(model).items():
        weight = state[name] = found[int(key.split(".")[0])]
        if tuple(weight.shape) != shape or not weight.isfinite().all():
            raise UserError(f"{source}: router {key} is {tuple(weight.shape)} where {shape} fits, or not finite")
    fingerprint = {**base_fingerprint(model, row_reader(base)), "name_or_path": base.name}
    with new_folder(output, overwrite, CONFIG_NAME) as staged:
        save_routers(model, staged, state=state, extra={"base": fingerprint, "imported_from": source.name})
    return sorted(found)


def _routers(source: Path) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, path in weight_map(source).items():
        match = _PUBLISHED.search(name)
        if match is not None and int(match[1]) in found:
            raise UserError(f"{path}: layer {match[1]} has two routers; a checkpoint of one decoder can be imported")
        if match is not None:
            with safe_open(path, framework="pt") as file:
                found[int(match[1])] = file.get_tensor(name).float()
    if not found:
        raise UserError(f"{source}: no key ends in layers.<N>.router.weight; did another code save these routers?")
    return found
