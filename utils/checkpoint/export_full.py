"""A tuned run as a checkpoint folder that stock tools load with ``trust_remote_code=True``, without copying shards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from router_tuning.checkpoint.base import base_probes, dense_config
from router_tuning.checkpoint.links import INDEX, WEIGHTS, link, new_folder, weight_map
from router_tuning.checkpoint.run_folder import tokenizer_of
from router_tuning.errors import UserError
from router_tuning.model import load_routers
from router_tuning.model.saving import CONFIG_NAME, WEIGHTS_NAME, read_router_config

GENERATION = "generation_config.json"


def export_full(run: Path, base: Path, output: Path, card: str, overwrite: bool = False) -> dict[str, Any]:
    """Write ``output``: linked base shards, ``router.safetensors``, index, config, code, tokenizer and model card.

    Args:
        run: folder with ``router.safetensors`` and ``router_config.json``.
        base: folder of the base checkpoint that the routers were trained on (safetensors).
        card: text of ``README.md``.

    Returns ``{"links": {file: "hard" | "symbolic"}, "bytes_added": int}``, the bytes that are not links.
    Raises :class:`UserError` if a part is missing, damaged, or does not fit the base.
    """
    if (run / "adapter").is_dir():
        raise UserError(f"{run} tuned LoRA as well: use --form peft, or --form merged for a full copy of the weights")
    if (run / "model").is_dir():  # all weights were tuned: they are the base of this export
        return link_routed(run, run / "model", output, card, overwrite)
    check_probes(run, base)
    return link_routed(run, base, output, card, overwrite)


def link_routed(run: Path, base: Path, output: Path, card: str, overwrite: bool = False) -> dict[str, Any]:
    """The folder of :func:`export_full` for routers and weights that are known to belong together."""
    model = routed_skeleton(run, base)
    shards = {name: file for name, file in weight_map(base).items() if "mod_router" not in name}
    with new_folder(output, overwrite, CONFIG_NAME) as staged:
        names = {file: shard_name(file) for file in sorted(set(shards.values()))}
        links = {name: link(file, staged / name) for file, name in names.items()}
        if (base / GENERATION).is_file():
            links[GENERATION] = link(base / GENERATION, staged / GENERATION)
        tokenizer_of(run, base).save_pretrained(staged)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            (staged / name).write_bytes((run / name).read_bytes())
        files = {name: names[file] for name, file in shards.items()} | dict.fromkeys(router_keys(run), WEIGHTS_NAME)
        size = sum(file.stat().st_size for file in names) + (run / WEIGHTS_NAME).stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        (staged / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        custom_object_save(model, str(staged), config=model.config)
        model.config.save_pretrained(staged)
        (staged / "README.md").write_text(card, encoding="utf-8")
        added = sum(file.stat().st_size for file in staged.iterdir() if file.name not in links)
    return {"links": links, "bytes_added": added}


def routed_skeleton(run: Path, base: Path) -> PreTrainedModel:
    """The routed model without memory (meta device): the run's routers checked against the base's configuration.

    Raises :class:`UserError` if they do not fit.
    """
    config = dense_config(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        load_routers(model, run)
    model.config.architectures = [type(model).__name__]
    return model


def check_fit(run: Path, base: Path) -> None:
    """:class:`UserError` unless the routers of ``run`` are sound and belong to the weights of ``base``; nothing is
    loaded but the routers.
    """
    check_probes(run, base)
    config = dense_config(base)
    with torch.device("meta"):
        load_routers(AutoModelForCausalLM.from_config(config), run)


def shard_name(file: Path) -> str:
    """Name of a base shard in the export: a lone ``model.safetensors`` would be preferred to the index."""
    return "base.safetensors" if file.name == WEIGHTS else file.name


def router_keys(run: Path) -> list[str]:
    """Tensor names in the run's ``router.safetensors``."""
    with safe_open(run / WEIGHTS_NAME, framework="pt") as file:
        return list(file.keys())


def check_probes(run: Path, base: Path) -> None:
    """Compare a few values of the base with those of the one that the routers were trained on."""
    saved, here = (read_router_config(run).get("base") or {}).get("probes"), base_probes(base)
    if not saved or not here:
        return
    if any(not math.isclose(a, b, rel_tol=2e-2, abs_tol=1e-4) for a, b in zip(saved, here, strict=True)):
        raise UserError(f"{run / CONFIG_NAME}: the base has other weights than the one these routers were trained on")
