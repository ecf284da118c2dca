"""Tries every text decoder of transformers at tiny size: routed, it equals its reference or is refused in one line.

    python -m pytest tests/all_decoders.py -rs [-k gemma]

Not part of the test run: it takes a quarter of an hour of one core. For whoever moves to another release of
transformers, or changes how keys and values are projected: each family is routed at every granularity; an accepted
model is compared with the masked dense one on padded batches, whole and through a cache. What is refused, and why, is
in the list of what was skipped.
"""

from __future__ import annotations

import copy

import pytest
import torch
from masked_reference import check
from tiny_models import random_batch, randomised
from tiny_routed import KINDS, with_reference
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

# What makes a config tiny, by the names that families use; a name that a config lacks is left out.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "n_inner", "inner_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 5),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 61),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 6),
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_key_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 8),
    **dict(
        mamba_d_ssm=32, mamba_expand=1, mamba_n_groups=1, n_groups=1, rotary_dim=4, laurel_rank=4, altup_num_inputs=2
    ),
    **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, num_kv_shared_layers=2),
    **dict(dropout=0.0, attention_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, hidden_dropout=0.0),
}
SPECIAL: dict[str, dict[str, object]] = {
    "bailing_hybrid": {"num_expert_group": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "gpt_neo": {"attention_types": [[["global", "local", "global", "local", "global"], 1]]},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2 + ["full_attention"]},
    "longcat_flash": {"expert_ffn_hidden_size": 24, "zero_expert_num": 2},
}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "activation_sparsity_pattern")


def tiny_config(family: str):
    """A config of the family with five layers and hidden size 32."""
    known = AutoConfig.for_model(family)
    if known.get_text_config() is not known:
        raise ValueError(f"composite: its text model is {known.get_text_config().model_type}")
    fields = known.to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    for name in PER_LAYER:
        kinds = fields.get(name)
        if isinstance(kinds, (list, tuple)):
            kinds = list(dict.fromkeys(kinds))
            sizes[name] = [kinds[number % len(kinds)] for number in range(5)]
    if isinstance(fields.get("intermediate_size"), (list, tuple)):
        sizes["intermediate_size"] = [48] * 5
    if "kv_lora_rank" in fields:  # latent attention has as many key heads as heads
        sizes["num_key_value_heads"] = 4
    return AutoConfig.for_model(family, **{**sizes, **SPECIAL.get(family, {})})


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request):
    """A random tiny model of a family, with logits large enough to tell outputs apart."""
    try:
        torch.manual_seed(0)
        config = tiny_config(request.param)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
        assert size <= 20_000_000, f"{size:,} parameters: it has sizes that SIZES does not name"
        model = randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
        with torch.no_grad():
            ids, _ = random_batch()
            whole, first = model(ids, use_cache=False).logits, model(ids[:, :9], use_cache=True)
            if getattr(first, "past_key_values", None) is not None:
                last = model(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True).logits
                assert torch.allclose(last, whole[:, 9:], atol=1e-3), "the dense model gives other logits by its cache"
    except Exception as error:
        pytest.skip(f"not built: {type(error).__name__}: {' '.join(str(error).split())[:160]}")
    return model


@pytest.mark.parametrize(
    ("granularity", "policy"), [*KINDS, ("attn_token+mlp_token", "keep"), ("expert_token", "keep")]
)
@torch.no_grad()
def test_routed_it_equals_its_reference_or_is_refused_in_one_line(dense, granularity, policy):
    model = copy.deepcopy(dense)
    classes = [type(module) for module in model.modules()]
    try:
        model, reference = with_reference(granularity=granularity, policy=policy, model=model)
    except ValueError as error:
        assert "\n" not in str(error) and [type(module) for module in model.modules()] == classes, "not rolled back"
        pytest.skip(f"refused: {error}")
    check(model, reference, tolerance=1e-3)
