"""Training: the straight-through gradient against the relaxed formula, what autograd records, checkpointing."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from refused import refused
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, routed_model, with_reference
from tiny_training import freeze_base, gradients, labels_of, same
from transformers import DynamicCache

from router_tuning.model import force_routing, kv_cache_bytes, record_routing, routed_modules


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "skip"),
    [
        *[(*case, "zero") for case in CASES],
        *[
            ("llama", g, "keep", "low_rank")
            for g in ("attn_sequence+mlp_token", "attn_token+mlp_token", "block_token")
        ],
    ],
)
def test_gradient_is_that_of_the_relaxed_formula(family, granularity, policy, skip):
    """For every weight of the model, routers, paths and base alike, at a batch where decisions differ."""
    model, reference = with_reference(family, granularity, policy, skip=skip)
    ids, mask = random_batch(padding="right")
    labels, theirs = labels_of(ids, mask), {}
    for name, module in model.named_modules():
        key = getattr(module, "mod_layer", None), getattr(module, "mod_part", None)
        if key in reference.weights:
            reference.weights[key] = theirs[f"{name}.mod_router.weight"] = copied(module.mod_router.weight)
        if key in reference.paths:
            reference.paths[key] = [*map(copied, reference.paths[key])]
            path = zip(("down", "up", "bias"), reference.paths[key], strict=True)
            theirs |= {f"{name}.mod_skip.{part}": values for part, values in path}
    with record_routing(model) as log:
        loss = model.train()(ids, attention_mask=mask, labels=labels).loss
    expected = reference.outputs(ids, mask, labels=labels).loss
    assert 0 < log.capacity()["total"] < 1
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    expected.backward()
    theirs = {name: values.grad for name, values in theirs.items()}
    assert all(gradient.abs().max() > 1e-5 for gradient in theirs.values()), "a zero gradient would prove nothing"
    same(gradients(model), {**gradients(reference.model), **theirs}, tolerance=1e-4)


def copied(parameter):
    return parameter.detach().clone().requires_grad_()


# ---------------------------------------------------------------- evaluation mode


def backward(model, ids, mask, use_cache=False, **inputs):
    """Gradients of a fixed linear function of the logits at real tokens, for every weight and the embeddings."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, attention_mask=mask, use_cache=use_cache, **inputs).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)) / mask.sum()
    (logits * direction * mask[..., None]).sum().backward()
    return logits.detach()[mask.bool()], {"embeddings": embedded.grad, **gradients(model)}


def imposed(layer, part, shape, _):
    return torch.rand(shape, generator=torch.Generator().manual_seed(layer)) < 0.7


@pytest.mark.parametrize(("family", "granularity", "policy"), CASES)
@pytest.mark.parametrize(
    ("use_cache", "tokens", "forced"), [(False, 12, False), (True, 300, False), (True, 400, True)]
)
def test_evaluation_mode_gives_the_gradients_of_training(family, granularity, policy, use_cache, tokens, forced):
    """With decisions imposed no router has a say, so only what is kept runs: packed queries, in chunks."""
    model = routed_model(family, granularity, kv_policy=policy)
    ids, mask = random_batch(tokens=tokens, padding="left")
    with force_routing(model, imposed) if forced else nullcontext():
        expected, trained = backward(model.train(), ids, mask)
        logits, evaluated = backward(model.eval(), ids, mask, use_cache)
    assert torch.allclose(logits, expected, atol=1e-5)
    same(evaluated, trained, tolerance=1e-3)
    if forced:
        return
    assert all(evaluated[n].abs().max() > 0 for n, _ in model.named_parameters() if "mod_router" in n)
    with torch.no_grad():  # what the cache holds is what it holds without gradients
        past = model(ids, attention_mask=mask, use_cache=True).past_key_values
    again = model(ids, attention_mask=mask, use_cache=True).past_key_values
    step, longer = ids[:, :1], torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    with torch.no_grad():
        ours, theirs = (model(step, attention_mask=longer, past_key_values=p).logits for p in (again, past))
    assert torch.allclose(ours, theirs, atol=1e-5) and kv_cache_bytes(again) == kv_cache_bytes(past)


@pytest.mark.parametrize(
    ("granularity", "policy"), [("attn_sequence", "keep"), ("mlp_sequence", "keep"), ("attn_token", "drop")]
)
def test_a_router_never_misses_a_gradient_silently(granularity, policy):
    model = routed_model("llama", granularity, kv_policy=policy)
    ids, _ = random_batch()
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        expected = model(ids, past_key_values=copy.deepcopy(past)).logits
    logits = model(ids, past_key_values=copy.deepcopy(past)).logits
    assert torch.allclose(logits, expected, atol=1e-5)
    with pytest.raises(ValueError, match="no gradient: pass the whole sequence"):
        logits.sum().backward()
    for module in routed_modules(model).values():
        module.mod_router.weight.requires_grad_(False)
    model(ids, past_key_values=past).logits.sum().backward()


# ---------------------------------------------------------------- what autograd keeps


def test_training_with_a_cache_is_refused():
    model = routed_model("llama").train()
    with refused("past_key_values"):
        model(random_batch()[0], past_key_values=DynamicCache(config=model.config))


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
