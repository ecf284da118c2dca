"""Outputs that modules which skip would leave incomplete: refused however they are asked for, complete elsewhere."""

from __future__ import annotations

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import routed_model

from router_tuning.model import route

ATTENTIONS = [("llama", g) for g in ("attn_sequence", "attn_token", "block_sequence", "block_token")]
ROUTER_LOGITS = [("mixtral", "mlp_token"), ("qwen2_moe", "mlp_sequence"), ("olmoe", "block_token")]
INCOMPLETE = [
    *[(*case, "output_attentions") for case in ATTENTIONS],
    *[(*case, "output_router_logits") for case in ROUTER_LOGITS],
]


def ask(model, ids, name, how):
    """By a keyword or the configuration, of the model or of its generation."""
    if "config" in how:
        setattr(model.config if how == "configuration" else model.generation_config, name, True)
    keywords = {} if "config" in how else {name: True}
    if "generat" not in how:
        return model(ids, **keywords)
    return model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **keywords)


@pytest.mark.parametrize(
    ("family", "granularity", "name", "how"),
    [
        *[(*case, how) for case in INCOMPLETE for how in ("keyword", "configuration")],
        *[(*case, "output_attentions", how) for case in ATTENTIONS for how in ("generate", "generation_config")],
    ],
)
def test_incomplete_outputs_are_refused_unless_a_keyword_says_no(family, granularity, name, how):
    model, (ids, _) = routed_model(family, granularity, attn="eager"), random_batch()
    with refused(f"{name} would be incomplete.*model.config.{name} = False"):
        ask(model, ids, name, how)
    model(ids, **{name: False})


@pytest.mark.parametrize(
    ("family", "granularity", "name"),
    [("llama", "mlp_token", "output_attentions"), ("mixtral", "attn_token", "output_router_logits")],
)
@pytest.mark.parametrize("how", ["keyword", "configuration"])
def test_complete_outputs_are_given(family, granularity, name, how):
    model, (ids, _), field = routed_model(family, granularity, attn="eager"), random_batch(), name.split("_", 1)[1]
    dense = getattr(tiny_model(family, "eager")(ids, **{name: True}), field)
    routed = getattr(ask(model, ids, name, how), field)
    assert [tuple(part.shape) for part in routed] == [tuple(part.shape) for part in dense]
    assert getattr(model(ids, **{name: False}), field, None) is None


@pytest.mark.parametrize(("family", "granularity"), ROUTER_LOGITS)
def test_training_runs_everything_and_gives_router_logits_whole(family, granularity):
    ids, model = random_batch()[0], tiny_model(family)
    dense = model(ids, output_router_logits=True).router_logits
    routed = route(model, mod_n=3, granularity=granularity).train()(ids, output_router_logits=True).router_logits
    torch.testing.assert_close(routed, dense)


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "mlp_token", "block_sequence", "block_token"])
def test_hidden_states_are_those_of_every_layer(granularity):
    model, seen = routed_model("llama", granularity), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *given: seen.append(given[-1]))
    states = model(random_batch()[0], output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(list(states[1:-1]), seen[:-1])
