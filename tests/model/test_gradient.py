"""Training: the straight-through gradient against the relaxed formula, what autograd records, checkpointing."""

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

IDS, MASK = random_batch(padding="right")
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": labels_of(IDS, MASK)}
PATHS = [("llama", g, "keep") for g in ("attn_sequence+mlp_token", "attn_token+mlp_token", "block_token")]


@pytest.mark.parametrize(
    ("family", "granularity", "policy", "skip", "checkpointing"),
    [
        *[(*case, "zero", None) for case in CASES],
        *[(*case, "low_rank", None) for case in PATHS],
        *[(*case, "zero", "enabled before") for case in CASES],
        *[(*case, "zero", "enabled after") for case in CASES[::3]],
    ],
)
def test_gradient_is_that_of_the_relaxed_formula(family, granularity, policy, skip, checkpointing):
    """Of loss and penalty, at a batch where decisions differ: for every weight of routers, paths and base, or, with
    gradient checkpointing, for the routers on a frozen base; what is recomputed is not logged again.
    """
    dense = tiny_model(family)
    if checkpointing == "enabled before":
        dense.gradient_checkpointing_enable()
    options = {"skip": skip, "gradient_scale": 3.0, "target_capacity": 0.4}
    model, reference = with_reference(family, granularity, policy, model=dense, **options)
    theirs = {}
    for name, module in model.named_modules():
        key = getattr(module, "mod_layer", None), getattr(module, "mod_part", None)
        if key in reference.weights:
            reference.weights[key] = theirs[f"{name}.mod_router.weight"] = copied(module.mod_router.weight)
        if key in reference.paths:
            reference.paths[key] = [*map(copied, reference.paths[key])]
            path = zip(("down", "up", "bias"), reference.paths[key], strict=True)
            theirs |= {f"{name}.mod_skip.{part}": values for part, values in path}
    if checkpointing:
        freeze_base(model).gradient_checkpointing_enable()
    with record_routing(model) as log:
        out = model.train()(**BATCH)
    loss, penalty = reference.outputs(IDS, MASK, labels=BATCH["labels"]).loss, reference.penalty(0.4)
    assert 0 < log.capacity()["total"] < 1 and 0 < penalty and torch.allclose(out.mod_penalty, penalty, atol=1e-6)
    assert torch.allclose(out.loss, loss + 3.0 * penalty, atol=1e-5)
    out.loss.backward()
    (loss + 3.0 * penalty).backward()
    theirs = {name: values.grad for name, values in theirs.items()}
    assert all(gradient.abs().max() > 1e-5 for gradient in theirs.values()), "a zero gradient would prove nothing"
    same(gradients(model), theirs if checkpointing else {**gradients(reference.model), **theirs}, tolerance=1e-4)
    assert {len(records) for records in log.records.values()} == {1}


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
    with refused("no gradient: pass the whole sequence"):
        logits.sum().backward()
    for module in routed_modules(model).values():
        module.mod_router.weight.requires_grad_(False)
    model(ids, past_key_values=past).logits.sum().backward()


def test_training_with_a_cache_is_refused():
    model = routed_model("llama").train()
    with refused("past_key_values"):
        model(IDS, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autograd_records_nothing_below_the_first_routed_layer(checkpointing):
    model = freeze_base(routed_model("llama", mod_layers=[3]))
    if checkpointing:
        model.gradient_checkpointing_enable()
    output = model(**BATCH, output_hidden_states=True)
    recorded = [hidden.requires_grad for hidden in output.hidden_states]
    assert recorded == [False] * 4 + [True] * 2  # the input of layers 0-3, then what layers 3 and 4 gave
    output.loss.backward()


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_token"])
def test_reentrant_checkpointing_is_refused(granularity):
    model = freeze_base(routed_model("llama", granularity))
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with refused("use_reentrant"):
        model(**BATCH)
    with torch.no_grad():
        model(**BATCH)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**BATCH).loss.backward()
    assert len(gradients(model)) == len(routed_modules(model))
