"""Tiny random models of every architecture family that the routing is tested on."""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

COMMON = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=61, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False,
)  # fmt: skip
# Sliding windows are shorter than the test sequences, so that they matter.
ALTERNATE = ["full_attention", "sliding_attention"] * 2 + ["full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 6, "head_dim": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8, "layer_types": ALTERNATE},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8, "layer_types": ALTERNATE},
    "phi3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.7},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1, 1]},
    "glm4": {"head_dim": 8},
    "cohere": {"use_qk_norm": True},
    "phi": {"qk_layernorm": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "olmoe": {"clip_qkv": 0.4, **EXPERTS},
    "qwen2_moe": {**dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24), **EXPERTS},
    "qwen3_moe": {"moe_intermediate_size": 24, "head_dim": 8, **EXPERTS},
}
MOE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def reset_empties() -> bool:
    """Whether ``reset`` empties a dynamic cache; in older versions of transformers it keeps its length."""
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 1, 1, 1), 0)
    cache.reset()
    return cache.get_seq_length() == 0


def tiny_model(family: str = "llama", attn: str = "sdpa", seed: int = 0, **overrides) -> PreTrainedModel:
    """A random 5-layer model in evaluation mode, with logits large enough to tell outputs apart."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    config._attn_implementation = attn
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation=attn))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """In evaluation mode, with matrices that give logits large enough to tell outputs apart."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    return model.eval()


def random_batch(rows: int = 3, tokens: int = 12, seed: int = 1, padding: str | None = None):
    """Ids ``[rows, tokens]`` without special tokens, and a mask; rows differ in length by ``padding`` side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, COMMON["vocab_size"], (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        pads = 0 if padding is None else 2 * row
        if pads:
            side = slice(0, pads) if padding == "left" else slice(tokens - pads, tokens)
            mask[row, side], ids[row, side] = 0, 0
    return ids, mask


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    """Of a left-padded batch."""
    ids, mask = random_batch(padding="left")
    return model(ids, attention_mask=mask).logits


def state_of(model) -> tuple:
    """All that a model must be again when it is refused or taken back."""
    modules = dict(model.named_modules())
    fields = {
        name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
        for name, module in modules.items()
    }
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()}
    classes = {name: type(module) for name, module in modules.items()}
    known = [fields, classes, hooks, [*model.state_dict()], type(model.config), copy.deepcopy(model.config.to_dict())]
    return *known, torch.get_rng_state().tolist()
