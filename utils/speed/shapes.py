"""Random models of the shapes that are timed: the published bases by their folders under ``ckpt``, and small ones."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from router_tuning.bases.description import dense_config
from router_tuning.places import ROOT

CKPT = ROOT / "ckpt"
BASES = ("llama3-8b", "mistral-7b", "qwen-2.5-7b")
SMALL = {
    "small": LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=2048
    ),
    "tiny": LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256,
    ),
}  # fmt: skip
SHAPES = (*SMALL, *BASES)


def shape_config(shape: str) -> PretrainedConfig:
    """The dense configuration of one of :data:`SHAPES`."""
    return SMALL[shape] if shape in SMALL else dense_config(CKPT / f"{shape}-mod")


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A dense model with random weights, made on its device, in evaluation mode."""
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(shape_config(shape), dtype=dtype).eval()
