"""A base on disk → a routed model in which only what trains requires a gradient."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from router_tuning.bases.description import read_config
from router_tuning.bases.preparing import downloaded
from router_tuning.errors import UserError
from router_tuning.model import ModConfig
from router_tuning.model.configuration_mod import select_layers
from router_tuning.model.saving import base_fingerprint
from router_tuning.places import ROOT, is_hub_id
from router_tuning.tuning.command.arguments import ModelArguments, RoutingArguments
from router_tuning.tuning.placement import candidates

_LARGE = 50_000_000


def locate_base(arguments: ModelArguments, weights: bool = True) -> Path:
    """The folder that holds the base; a hub id is downloaded (only its config where ``weights`` is False).

    Raises:
        UserError: if there is no such base, or its weights are missing; with the command that brings them.
    """
    folder = Path(arguments.base).expanduser()
    if not folder.is_dir():
        if arguments.model_name_or_path and is_hub_id(arguments.base):
            patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"] if weights else ["config.json"]
            options = {"cache_dir": arguments.cache_dir, "token": arguments.token}
            return downloaded(arguments.base, patterns, revision=arguments.model_revision, **options)
        known = sorted(path.parent.name for path in (ROOT / "ckpt").glob("*/config.json"))
        raise UserError(f"no base at {folder}; folders under ckpt are {', '.join(known) or 'none'}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json: it is no checkpoint folder")
    if weights and not any(folder.glob("*.safetensors")):
        name = arguments.folder_name or folder.name
        raise UserError(
            f"{folder} holds no weights (*.safetensors); bring them with: "
            f"python entrypoints/checkpoint/prepare_base.py --folder_name {name} --source <hub id or local folder>"
        )
    return folder


def cpu_dtype(parameters: int) -> str:
    """The type in which a frozen base of so many parameters is fastest on this machine's CPU.

    Natively multiplied, bfloat16 is three to four times as fast as float32 where matrices are large.
    """
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native and parameters >= _LARGE else "float32"


def routing_of(config: PretrainedConfig, routing: RoutingArguments) -> ModConfig:
    """The routing of this run on this base: ``mod_n`` defaults to half of the layers, ``auto`` stands for all.

    UserError if it does not fit.
    """
    text = config.get_text_config()
    layers = text.num_hidden_layers
    if routing.skip == "low_rank" and routing.skip_rank > text.hidden_size:
        raise UserError(f"--skip_rank {routing.skip_rank} must be at most the base's hidden size, {text.hidden_size}")
    if routing.mod_n is None and routing.mod_layers is None:
        routing.mod_n = layers // 2
    if routing.mod_layers is None and not 1 <= routing.mod_n < layers:
        raise UserError(f"--mod_n {routing.mod_n} must lie in 1…{layers - 1}: the base has {layers} layers")
    try:
        config = routing.config()
        if routing.mod_layers == "auto":
            config.mod_layers = candidates(config, layers)
        elif routing.mod_layers is not None:
            config.mod_layers = select_layers(layers, None, config.mod_layers, config.parts)
        return config
    except ValueError as error:
        raise UserError(f"--{error}") from None


def load_base(folder: Path, arguments: ModelArguments, config: PretrainedConfig) -> PreTrainedModel:
    """The dense base, frozen. UserError for one that cannot be loaded."""
    options: dict[str, Any] = {"dtype": getattr(torch, arguments.dtype), "config": config, "use_safetensors": True}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=arguments.trust_remote_code, **options)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from None
    return model.requires_grad_(False)


def mark_trainable(model: PreTrainedModel, routing: RoutingArguments) -> PreTrainedModel:
    """Freeze all but routers, or routers and new LoRA adapters, or nothing.

    Nothing below the first routed layer needs a gradient then, so autograd records the deepest layers alone.
    """
    if routing.trains == "lora":
        targets = routing.lora_target_modules
        lora = LoraConfig(
            r=routing.lora_r,
            lora_alpha=routing.lora_alpha,
            lora_dropout=routing.lora_dropout,
            target_modules=targets if targets == "all-linear" else targets.split(","),
            modules_to_save=["mod_router"],
            task_type="CAUSAL_LM",
        )
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise UserError(f"--lora_target_modules {targets}: {' '.join(str(error).split())}") from None
    for name, parameter in model.named_parameters():
        if "mod_skip" in name:
            parameter.requires_grad_(routing.train_skip or routing.trains == "full")
        elif routing.trains != "lora":
            parameter.requires_grad_(routing.trains == "full" or "mod_router" in name)
    return model


def identify(model: PreTrainedModel, base: Path) -> dict[str, Any]:
    """:func:`base_fingerprint` of a fresh model, also where ZeRO-3 has already cut its weights. Collective."""
    norms = (parameter for name, parameter in model.named_parameters() if name.endswith("model.norm.weight"))
    parts = [model.get_input_embeddings().weight, *norms]
    gathered = nullcontext()
    if hasattr(parts[0], "ds_id"):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parts)
    with gathered:
        found = base_fingerprint(model)
    return found | {"name_or_path": read_config(base).get("mod_base", found["name_or_path"])}
