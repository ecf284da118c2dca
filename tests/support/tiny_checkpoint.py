"""A base checkpoint folder and a tuned run on it, random but complete: what export and evaluation start from."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import tiny_model

from router_tuning.embedded.base_training import build_tokenizer
from router_tuning.model import route, routed_modules, save_routers

LAYERS = [1, 2, 3]


def write_base(folder: Path, family: str = "llama", max_shard_size: str = "5GB", seed: int = 0) -> Path:
    """A base with tokenizer: plain family weights, as from the hub."""
    tokenizer = build_tokenizer(vocab_size=300, samples_per_task=5)
    model = tiny_model(family, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=512, num_hidden_layers=6)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_run(folder: Path, base: Path, granularity: str = "attn_sequence", seed: int = 0, **routing) -> Path:
    """Routers of that base whose decisions differ between inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    route(model, mod_layers=LAYERS, granularity=granularity, **routing)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in routed_modules(model).values():
            module.mod_router.weight.normal_(generator=generator)
    save_routers(model, folder)
    return folder
