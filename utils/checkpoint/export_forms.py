"""The other forms of an export: routers alone, LoRA with routers for peft, and LoRA merged into the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from router_tuning.checkpoint.base import dense_config
from router_tuning.checkpoint.export_full import link_routed, routed_skeleton
from router_tuning.checkpoint.links import new_folder, tensor_names
from router_tuning.checkpoint.run_folder import tokenizer_of
from router_tuning.errors import UserError
from router_tuning.model import load_routers
from router_tuning.model.saving import CONFIG_NAME, WEIGHTS_NAME, read_router_config, read_router_weights

ADAPTER = "adapter"
"""Folder of a LoRA run that holds what peft saved."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def export_adapter(run: Path, output: Path, card: str, overwrite: bool = False) -> dict[str, Any]:
    """Routers alone, some KB: load them with ``from_pretrained(base)`` and ``load_routers(model, output)``."""
    read_router_config(run), read_router_weights(run)
    with new_folder(output, overwrite, CONFIG_NAME) as staged:
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            shutil.copyfile(run / name, staged / name)
        (staged / "README.md").write_text(card, encoding="utf-8")
        return {"links": {}, "bytes_added": sum(file.stat().st_size for file in staged.iterdir())}


def export_peft(run: Path, base: Path, output: Path, card: str, overwrite: bool = False) -> dict[str, Any]:
    """A peft folder: LoRA and routers in ``adapter_model.safetensors``, and ``base/``, the routed base by links.

    ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output/base, trust_remote_code=True), output)``.
    Raises :class:`UserError` for a run without a LoRA adapter.
    """
    source = run / ADAPTER
    check_adapter(source)
    with new_folder(output, overwrite, ADAPTER_FILES[0]) as staged:
        report = link_routed(run, base, staged / "base", card)
        config = json.loads((source / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(output.resolve() / "base")
        (staged / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(source / ADAPTER_FILES[1], staged / ADAPTER_FILES[1])
        (staged / "README.md").write_text(card, encoding="utf-8")
        own = sum(file.stat().st_size for file in staged.iterdir() if file.is_file())
    return {"links": report["links"], "bytes_added": report["bytes_added"] + own}


def check_adapter(folder: Path) -> None:
    """:class:`UserError` unless ``folder`` holds a LoRA adapter as safetensors (a pickle beside it is never read)."""
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: no such file; a LoRA adapter comes from a run tuned with --lora True")
    path = folder / ADAPTER_FILES[1]
    for name in tensor_names(path):
        with safe_open(path, framework="pt") as file:
            if not bool(torch.isfinite(file.get_tensor(name)).all()):
                raise UserError(f"{path}: {name} holds values that are not finite; save it anew")


def export_merged(run: Path, base: Path, output: Path, card: str, overwrite: bool = False) -> dict[str, Any]:
    """LoRA merged into a full copy of the weights: one folder without peft, as large as the base."""
    if not (run / ADAPTER).is_dir():
        raise UserError(f"{run / ADAPTER}: no such folder; only a run that was tuned with --lora True can be merged")
    check_adapter(run / ADAPTER)
    routed_skeleton(run, base)
    model = AutoModelForCausalLM.from_pretrained(base, config=dense_config(base), dtype="auto", use_safetensors=True)
    merged = PeftModel.from_pretrained(load_routers(model, run), run / ADAPTER).merge_and_unload()
    with new_folder(output, overwrite, CONFIG_NAME) as staged:
        merged.save_pretrained(staged)
        tokenizer_of(run, base).save_pretrained(staged)
        shutil.copyfile(run / CONFIG_NAME, staged / CONFIG_NAME)
        (staged / "README.md").write_text(card, encoding="utf-8")
        return {"links": {}, "bytes_added": sum(file.stat().st_size for file in staged.iterdir())}
