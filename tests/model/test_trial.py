"""Architectures: what lacks a module is refused in one line, what only looks alike as well, the rest is exact."""

import json
from types import MethodType
from unittest.mock import Mock

import pytest
import torch
from masked_reference import check
from refused import refused
from tiny_models import COMMON, random_batch, randomised, state_of, tiny_model
from tiny_routed import LAYERS, with_reference
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention

from router_tuning.model import installing, is_routed, route

GEMMA_3N = dict(
    num_hidden_layers=6, vocab_size_per_layer_input=61, intermediate_size=[48] * 6,
    activation_sparsity_pattern=[0.0] * 6, layer_types=["sliding_attention", "full_attention"] * 3,
    hidden_size_per_layer_input=8, laurel_rank=4, altup_num_inputs=2, num_kv_shared_layers=0,
)  # fmt: skip
SHARED = {**GEMMA_3N, "num_kv_shared_layers": 2}
# Modules of the right names that mean something else; found by trying every causal LM of transformers.
ODD = [
    ("cohere2", "attn_token", "routed as .*attention differs", {}),  # rotary embeddings in sliding layers only
    ("exaone4", "attn_token", "routed as .*attention differs", {}),
    ("nanochat", "attn_token", "routed as .*attention fails", {}),  # keys normalised behind the rotation
    ("apertus", "block_token", "routed as .*block differs", {}),  # its norm has another name
    ("gpt_oss", "mlp_token", "routed as .*MLP fails.*tuple", {}),
    ("falcon_h1", "attn_sequence", "routed as .*DynamicCache", {}),  # attention and state space side by side
    ("gemma3n_text", "attn_sequence", "layer [45] .*output", SHARED),  # where the keys of layers 2 and 3 are read
    ("gemma3n_text", "attn_token", "routed as .*attention", GEMMA_3N),
    ("gemma3n_text", "block_sequence", "routed as .*block", GEMMA_3N),  # arguments per token
]
MISSING = [
    ("gpt2", "attn_sequence", "GPT2LMHeadModel.*'layers'", {}),
    ("mamba", "attn_sequence", "MambaForCausalLM.*'self_attn'", {}),
    ("mamba", "mlp_token", "MambaForCausalLM.*'mlp'", {}),
    ("gpt_neox", "block_token", "GPTNeoXForCausalLM.*'self_attn'", {}),
    ("llama", "expert_token", "LlamaForCausalLM.*'experts'", {}),
]


def lookalike(family, **sizes):
    sizes = {**COMMON, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, **sizes}
    sizes |= {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8} if "h1" in family else {}
    known = AutoConfig.for_model(family)
    config = AutoConfig.for_model(family, **{name: size for name, size in sizes.items() if hasattr(known, name)})
    torch.manual_seed(0)
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("family", "granularity", "words", "sizes", "training"),
    [*[(*odd, False) for odd in (*MISSING, *ODD)], *[(*odd, True) for odd in ODD[::4]]],
)
def test_what_lacks_a_module_or_only_looks_alike_is_refused_and_left(family, granularity, words, sizes, training):
    model = lookalike(family, **sizes).train(training)
    if training:
        model.base_model.layers[0].eval()
    before, logits = state_of(model), lookalike(family, **sizes)(random_batch()[0]).logits
    with refused(words):
        route(model, mod_layers=[2, 3], granularity=granularity)
    assert not is_routed(model) and state_of(model) == before
    assert torch.equal(model.eval()(random_batch()[0]).logits, logits)


@pytest.mark.parametrize(
    ("family", "granularity", "policy"),
    [
        *[("cohere2", "attn_token", "drop"), ("cohere2", "block_sequence", "keep"), ("apertus", "attn_token", "keep")],
        *[("starcoder2", g, "keep") for g in ("block_token", "attn_sequence+mlp_token")],
        *[("gpt_oss", "block_token", "keep"), ("gpt_neox", "mlp_sequence", "keep")],
    ],
)
def test_a_family_that_no_matrix_holds_is_exact_where_it_is_accepted(family, granularity, policy):
    check(*with_reference(granularity=granularity, policy=policy, model=lookalike(family), mod_layers=[2, 3]))


ATTEND = LlamaAttention.forward


def normed_keys(self, hidden_states, **kwargs):
    """Attention whose keys are normalised within the rotation, as in several research forks."""
    plain = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = lambda q, k, cos, sin: plain(q, normalize(k, dim=-1), cos, sin)
    try:
        return ATTEND(self, hidden_states, **kwargs)
    finally:
        modeling_llama.apply_rotary_pos_emb = plain


class Elsewhere(LlamaAttention):
    forward = normed_keys


def cumulative(_, args, kwargs):
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].cumsum(1)}


CHANGES = {
    "another class": lambda attention, _: setattr(attention, "__class__", Elsewhere),
    "another forward": lambda attention, _: setattr(attention, "forward", MethodType(normed_keys, attention)),
    "another forward of the class": lambda _, patch: patch.setattr(LlamaAttention, "forward", normed_keys),
    "another part": lambda a, _: setattr(a, "k_proj", nn.Sequential(a.k_proj, nn.Softmax(1))),
    "a hook": lambda attention, _: attention.register_forward_pre_hook(cumulative, with_kwargs=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_familys_name_is_no_proof(change, monkeypatch):
    model = tiny_model()
    for layer in model.model.layers:
        CHANGES[change](layer.self_attn, monkeypatch)
    with refused("layer [01] of LlamaForCausalLM .* (attention|output) differs"):
        route(model, mod_layers=LAYERS, granularity="attn_token")
    assert not is_routed(model)


def around_the_module(self, hidden_states, **kwargs):
    """A layer that runs the code of its attention, and never the module."""
    attended = ATTEND(self.self_attn, self.input_layernorm(hidden_states), **kwargs)[0] + hidden_states
    return attended + self.mlp(self.post_attention_layernorm(attended))


def test_a_module_that_never_runs_is_no_place_for_a_router():
    model = tiny_model()
    for layer in model.model.layers:
        layer.forward = MethodType(around_the_module, layer)
    model(random_batch()[0])
    with refused("layer 1 of LlamaForCausalLM .* its attention runs 0 times"):
        route(model, mod_layers=LAYERS)
    experts = tiny_model("mixtral")
    del experts.model.layers[2].mlp.experts.num_experts
    with refused("layer 2 of MixtralForCausalLM .* no 'num_experts'"):
        route(experts, mod_layers=LAYERS, granularity="expert_token")


def test_an_error_while_routing_leaves_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(installing, "skip_path", Mock(side_effect=RuntimeError("no room")))
    model = tiny_model()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="no room"):
        route(model, mod_layers=LAYERS)
    assert state_of(model) == before


@pytest.mark.parametrize("first", ["patch", "route"])
def test_a_rotation_that_another_library_replaces_is_the_one_that_is_used(first, monkeypatch):
    def replace():
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *at: plain(q, normalize(k), *at))

    plain = modeling_llama.apply_rotary_pos_emb
    if first == "patch":
        replace()
    model, reference = with_reference(granularity="attn_token")
    if first == "route":
        replace()
    check(model, reference)


@pytest.mark.parametrize(("family", "granularity", "words", "sizes"), ODD[1::3])
def test_what_a_configuration_or_a_checkpoint_routes_is_tried_too(family, granularity, words, sizes, tmp_path):
    lookalike(family, **sizes).save_pretrained(tmp_path)
    fields, routing = tmp_path / "config.json", {"mod_layers": [2, 3], "mod_granularity": granularity}
    fields.write_text(json.dumps(json.loads(fields.read_text()) | routing))
    with refused(words):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="eager").eval()
    with refused("layer . of .* cannot be routed as"):
        built(random_batch()[0])


@pytest.mark.parametrize("granularity", ["mlp_sequence", "block_token", "attn_token+mlp_token"])
def test_a_trial_costs_less_than_three_passes_of_16_tokens(granularity):
    model, seen = tiny_model("mixtral").to(torch.bfloat16), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    route(model, mod_layers=LAYERS, granularity=granularity, skip="low_rank")
    assert len(seen) == 4 and sum(seen) <= 3 * 16


def test_a_model_without_weights_is_tried_when_it_has_them():
    with torch.device("meta"):
        model = lookalike("nanochat")
    route(model, mod_layers=[2, 3], granularity="attn_token")
    weights = lookalike("nanochat").state_dict() | {
        name: torch.zeros_like(value, device="cpu") for name, value in model.state_dict().items() if "mod_" in name
    }
    model.load_state_dict(weights, assign=True)
    model.model.rotary_emb = lookalike("nanochat").model.rotary_emb
    for _ in range(2):
        with refused("layer 2 of NanoChatModel .* attention fails"):
            model(random_batch()[0])
