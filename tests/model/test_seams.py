"""Architectures: what lacks a seam is refused in one line, what only looks alike as well, the rest is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_reference import MaskedReference
from tiny_models import COMMON, FAMILIES, random_batch
from tiny_routed import routed_model, router_weights
from transformers import AutoConfig, AutoModelForCausalLM

from router_tuning.model import is_routed, route
from router_tuning.model.configuration_mod import parse_granularity
from router_tuning.model.seams import PROVEN, decoder_of


@pytest.mark.parametrize(
    ("family", "granularity", "seam"),
    [
        ("gpt2", "attn_sequence", "layers"),
        ("mamba", "attn_sequence", "self_attn"),
        ("mamba", "mlp_token", "mlp"),
        ("gpt_neox", "block_token", "self_attn"),
        ("llama", "expert_token", "experts"),
    ],
)
def test_a_missing_seam_is_named_in_one_line(family, granularity, seam):
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=61, intermediate_size=48)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **ids))
    classes = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match=f"'{seam}'") as error:
        route(model, mod_n=2, granularity=granularity)
    assert "\n" not in str(error.value) and type(model).__name__ in str(error.value)
    assert {type(module) for module in model.modules()} == classes


# Modules of the right names that mean something else; found by trying every causal LM of transformers.
@pytest.mark.parametrize(
    ("family", "granularity", "policy", "words"),
    [
        ("cohere2", "attn_token", "keep", "keys and values"),  # rotary embeddings in sliding layers only
        ("exaone4", "attn_token", "keep", "keys and values"),
        ("apertus", "block_token", "keep", "input_layernorm"),  # its norm has another name
        ("gpt_oss", "mlp_token", "keep", "mlp module"),  # returns a tuple
        ("falcon_h1", "attn_sequence", "keep", "cache layer"),  # attention and state space side by side
    ],
)
def test_a_family_that_only_looks_alike_is_refused_where_it_differs(family, granularity, policy, words):
    model = lookalike(family)
    classes = {type(module) for module in model.modules()}
    with pytest.raises(ValueError, match=words) as error:
        route(model, mod_layers=[2, 3], granularity=granularity, kv_policy=policy)
    assert "\n" not in str(error.value) and not is_routed(model)
    assert {type(module) for module in model.modules()} == classes and not model.training


@pytest.mark.parametrize(
    ("family", "granularity", "policy"),
    [
        ("cohere2", "attn_token", "drop"),
        ("cohere2", "block_sequence", "keep"),
        ("apertus", "attn_token", "keep"),
        ("gpt_oss", "block_token", "keep"),
        ("starcoder2", "block_token", "keep"),
        ("starcoder2", "attn_sequence+mlp_token", "keep"),
        ("gpt_neox", "mlp_sequence", "keep"),
    ],
)
def test_a_family_that_no_matrix_holds_is_exact_where_it_is_accepted(family, granularity, policy):
    model = lookalike(family)
    dense = copy.deepcopy(model)
    routed_model(granularity=granularity, model=model, kv_policy=policy, mod_layers=[2, 3])
    ids, mask = random_batch(padding="left")
    dense.model = decoder_of(dense)
    reference = MaskedReference(dense, router_weights(model), parse_granularity(granularity), policy)
    with torch.no_grad():
        difference = model(ids, attention_mask=mask, use_cache=False).logits - reference.logits(ids, mask)
    assert difference[mask.bool()].abs().max() < 1e-4


def lookalike(family):
    sizes = {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8} if "h1" in family else {}
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{name: size for name, size in sizes.items() if hasattr(known, name)})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=0.15)
    return model


def test_proven_families_are_those_of_the_equivalence_matrix():
    assert PROVEN == set(FAMILIES)


def test_what_is_not_a_transformers_model_is_refused():
    with pytest.raises(ValueError, match="transformers model"):
        route(torch.nn.Linear(2, 2), mod_n=1)
