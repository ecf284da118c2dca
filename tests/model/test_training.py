"""Training mode: what autograd records, gradient checkpointing; its values are held in test_equivalence."""

from __future__ import annotations

import copy

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, routed_model
from tiny_training import freeze_base, gradients, labels_of, same
from transformers import DynamicCache

from router_tuning.model import record_routing, routed_modules


def test_training_with_a_cache_is_refused():
    model = routed_model("llama").train()
    with refused("past_key_values"):
        model(random_batch()[0], past_key_values=DynamicCache(config=model.config))


# ---------------------------------------------------------------- what autograd keeps


@pytest.mark.parametrize(("family", "granularity", "policy"), CASES)
def test_only_routers_get_gradients_when_the_base_is_frozen(family, granularity, policy):
    model = freeze_base(routed_model(family, granularity, kv_policy=policy))
    before = copy.deepcopy(model.state_dict())
    ids, mask = random_batch(padding="right")
    model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss.backward()
    expected = {name for name, _ in model.named_parameters() if "mod_router" in name}
    assert set(gradients(model)) == expected and len(expected) == len(routed_modules(model))
    assert all(gradient.abs().sum() > 0 for gradient in gradients(model).values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != ("mod_router" in name), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autograd_records_nothing_below_the_first_routed_layer(checkpointing):
    model = freeze_base(routed_model("llama", mod_layers=[3]))
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, _ = random_batch()
    output = model(ids, output_hidden_states=True, labels=ids)
    recorded = [hidden.requires_grad for hidden in output.hidden_states]
    assert recorded == [False] * 4 + [True] * 2  # the input of layers 0-3, then what layers 3 and 4 gave
    output.loss.backward()


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "frozen", "when"),
    [*[(*case, True, "before") for case in CASES], *[(*case, False, "after") for case in CASES[::3]]],
)
def test_gradient_checkpointing_gives_the_same_gradients(family, granularity, policy, frozen, when):
    """Whether it was enabled before the model was routed or after."""
    ids, mask = random_batch(padding="right")

    def run(checkpointing):
        model = tiny_model(family)
        if checkpointing and when == "before":
            model.gradient_checkpointing_enable()
        model = routed_model(family, granularity, model=model, kv_policy=policy).train()
        if frozen:
            freeze_base(model)
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable()
        with record_routing(model) as log:
            loss = model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
        (loss + log.penalty(0.1)).backward()
        return gradients(model), log

    plain, log = run(False)
    checkpointed, log_again = run(True)
    same(checkpointed, plain)
    for key, keep in log.decisions.items():
        assert torch.equal(log_again.decisions[key], keep), "recomputation must not be logged again"
        assert len(log_again.records[key]) == 1


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_reentrant_checkpointing_is_refused(granularity):
    model = freeze_base(routed_model("llama", granularity))
    ids, _ = random_batch()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with refused("use_reentrant"):
        model(ids, labels=ids)
    with torch.no_grad():
        model(ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(ids, labels=ids).loss.backward()
    assert len(gradients(model)) == len(routed_modules(model))
