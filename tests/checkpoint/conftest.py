"""A tiny sharded base and a run on it, made once for the tests of this folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_checkpoint import write_base, write_run
from tiny_models import random_batch
from transformers import AutoModelForCausalLM

from router_tuning.model import load_routers


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("checkpoints") / "base", max_shard_size="100KB")


@pytest.fixture(scope="session")
def run(tmp_path_factory, base) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run", base)


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory, run, base):
    """A run with LoRA, as the tuning entrypoint leaves it: routers beside ``adapter/``; and its logits."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    shutil.copytree(run, folder)
    model = load_routers(AutoModelForCausalLM.from_pretrained(base), run)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["mod_router"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(folder / "adapter")
    ids, mask = random_batch(rows=6, padding="left")
    return folder, tuned(ids, attention_mask=mask).logits
