"""A base checkpoint folder and a tuned run on it, random but complete: what export and evaluation start from."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import random_batch, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.model import load_routers, route, routed_modules, save_routers
from router_tuning.model.saving import read_router_config

LAYERS = [1, 2, 3]


def write_base(folder: Path, family: str = "llama", max_shard_size: str = "5GB", seed: int = 0) -> Path:
    """A base with tokenizer: plain family weights, as from the hub."""
    tokenizer = build_tokenizer(vocab_size=300, samples_per_task=5)
    model = tiny_model(family, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_run(folder: Path, base: Path, granularity: str = "attn_sequence", seed: int = 0, **routing) -> Path:
    """Routers of that base whose decisions differ between inputs."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    route(model, mod_layers=LAYERS, granularity=granularity, **routing)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in routed_modules(model).values():
            module.mod_router.weight.normal_(generator=generator)
    save_routers(model, folder)
    return folder


@torch.no_grad()
def tuned_run(folder: Path, base: Path, what: str, granularity: str = "attn_sequence") -> torch.Tensor:
    """A run that trained ``what`` (a key of ``HOLDS``), as the tuning entrypoint leaves it; returns its logits."""
    write_run(folder, base, granularity)
    model = load_routers(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    if what == "routers and LoRA":
        config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["mod_router"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        model.save_pretrained(folder / "adapter")
    elif what == "all weights":
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.save_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(base, config=model.config).save_pretrained(folder / "model")
        recorded = read_router_config(folder)["base"]  # the fingerprint of the base as it was before
        save_routers(model, folder, extra={"base": recorded})
    return tiny_logits(model)


@torch.no_grad()
def tiny_logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a padded batch, in evaluation mode."""
    ids, mask = random_batch(rows=6, padding="left")
    return model.eval()(ids, attention_mask=mask).logits


def write_dial(run: Path) -> Path:
    """Give a run whose attentions are routed a dial from half of the decoder's operations to all."""
    config = json.loads((run / "router_config.json").read_text())
    logits = {f"{layer}.attn": [9.0, -9.0] for layer in LAYERS}
    config["dial"] = {"capacity": [0.0, 1.0], "flops": [0.5, 1.0], "logit": logits}
    (run / "router_config.json").write_text(json.dumps(config))
    return run
