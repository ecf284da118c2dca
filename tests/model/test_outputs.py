"""Outputs that modules which skip would leave incomplete: refused however they are asked for, complete elsewhere."""

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import routed_model

from router_tuning.model import route

IDS, _ = random_batch()
ATTENTIONS = [("llama", g) for g in ("attn_sequence", "attn_token", "block_sequence", "block_token")]
ROUTER_LOGITS = [("mixtral", "mlp_token"), ("qwen2_moe", "mlp_sequence"), ("olmoe", "block_token")]
WAYS = ("forward", "config", "generate", "generation_config")
REFUSED = [(*case, "output_attentions", how) for case in ATTENTIONS for how in WAYS]
REFUSED += [(*case, "output_router_logits", how) for case in ROUTER_LOGITS for how in WAYS[:2]]


def ask(model, name, how):
    """By a keyword of a method, or by a configuration."""
    if "config" in how:
        setattr(getattr(model, how), name, True)
    keywords = {} if "config" in how else {name: True}
    if "generat" in how:
        return model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, **keywords)
    return model(IDS, **keywords)


@pytest.mark.parametrize(("family", "granularity", "name", "how"), REFUSED)
def test_incomplete_outputs_are_refused_unless_a_keyword_says_no(family, granularity, name, how):
    model = routed_model(family, granularity, attn="eager")
    with refused(f"{name} would be incomplete.*model.config.{name} = False"):
        ask(model, name, how)
    model(IDS, **{name: False})


@pytest.mark.parametrize(
    ("family", "granularity", "name"),
    [("llama", "mlp_token", "output_attentions"), ("mixtral", "attn_token", "output_router_logits")],
)
@pytest.mark.parametrize("how", ["forward", "config"])
def test_complete_outputs_are_given(family, granularity, name, how):
    model, field = routed_model(family, granularity, attn="eager"), name.split("_", 1)[1]
    dense, routed = (getattr(ask(one, name, how), field) for one in (tiny_model(family, "eager"), model))
    assert [tuple(part.shape) for part in routed] == [tuple(part.shape) for part in dense]
    assert getattr(model(IDS, **{name: False}), field, None) is None


@pytest.mark.parametrize(("family", "granularity"), ROUTER_LOGITS)
def test_training_runs_everything_and_gives_router_logits_whole(family, granularity):
    model = tiny_model(family)
    dense = ask(model, "output_router_logits", "forward").router_logits
    route(model, mod_n=3, granularity=granularity).train()
    torch.testing.assert_close(ask(model, "output_router_logits", "forward").router_logits, dense)


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "mlp_token", "block_sequence", "block_token"])
def test_hidden_states_are_those_of_every_layer(granularity):
    model, seen = routed_model("llama", granularity), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *given: seen.append(given[-1]))
    first, *states, last = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers - 1
    torch.testing.assert_close(states, seen[:-1])
