"""The straight-through gradient against the relaxed formula, and that of the capacity penalty by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import CASES, LAYERS, routed_model
from tiny_training import gradients, labels_of, same
from torch.nn import functional

from router_tuning.model import force_routing, kv_cache_bytes, record_routing, routed_modules

# ---------------------------------------------------------------- the gradient


def relax(model, granularity, policy):
    """The relaxed formula on a dense model: ``x + (m + s − stop(s))·F(h)``, written with hooks and plain autograd."""
    real = {}

    def gate(router, hidden, level):
        if level == "sequence":
            weight = real["mask"].float()
            hidden = (hidden.float() * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
        score = torch.sigmoid(functional.linear(hidden.float(), router))
        keep = (score >= 0.5).float()
        if level == "token":
            keep = keep * real["mask"][..., None]
        return keep + score - score.detach()

    def seen_keys(keep, mask):
        """Under drop a token sees the kept ones and itself."""
        tokens = keep.shape[1]
        seen = keep.bool()[:, None, :] | torch.eye(tokens).bool()
        causal = torch.ones(tokens, tokens).tril().bool()[None, None] if mask is None else mask
        return causal & seen[:, None]

    routers = torch.nn.ParameterDict()
    for part, level in (name.split("_") for name in granularity.split("+")):
        for layer in LAYERS:
            block, key = model.model.layers[layer], f"{layer}_{part}"
            routers[key] = torch.nn.Parameter(torch.zeros(4 if part == "expert" else 1, 32))
            state = {}

            def look(hidden, key=key, level=level, state=state):
                state["gate"] = gate(routers[key], hidden, level)

            def before(_, args, kwargs, look=look, key=key, block=block, part=part, state=state):
                hidden = args[0] if args else kwargs["hidden_states"]
                if part == "expert":
                    score = torch.sigmoid(functional.linear(hidden, routers[key])).gather(1, args[1])
                    keep = (score >= 0.5) & real["mask"].bool().flatten()[:, None]
                    return (*args[:2], args[2] * (keep + score - score.detach())), kwargs
                look(block.input_layernorm(hidden) if part == "block" else hidden)
                if policy == "drop" and part != "mlp":
                    mask = seen_keys(state["gate"][..., 0], kwargs["attention_mask"])
                    kwargs = {**kwargs, "attention_mask": mask}
                return args, kwargs

            def after(_, args, output, part=part, state=state):
                if part == "expert":
                    return output
                if part == "attn":
                    return (state["gate"] * output[0], *output[1:])
                return args[0] + state["gate"] * (output - args[0]) if part == "block" else state["gate"] * output

            module = {"attn": block.self_attn, "mlp": block.mlp, "block": block}
            module = block.mlp.experts if part == "expert" else module[part]
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)
    return routers, real


@pytest.mark.parametrize(("family", "granularity", "policy"), CASES)
def test_gradient_is_that_of_the_relaxed_formula(family, granularity, policy):
    """For every weight of the model, routers and base alike, at a batch where decisions differ."""
    model = routed_model(family, granularity, kv_policy=policy).train()
    relaxed = tiny_model(family).train()
    routers, real = relax(relaxed, granularity, policy)
    ids, mask = random_batch(padding="right")
    real["mask"] = mask
    with torch.no_grad():
        for module in routed_modules(model).values():
            routers[f"{module.mod_layer}_{module.mod_part}"].copy_(module.mod_router.weight)
    with record_routing(model) as log:
        loss = model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
    expected = relaxed(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
    assert 0 < log.capacity()["total"] < 1
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    expected.backward()
    ours, theirs = gradients(model), gradients(relaxed)
    for module in routed_modules(model).values():
        key = f"{module.mod_layer}_{module.mod_part}"
        name = next(n for n, m in model.named_modules() if m is module) + ".mod_router.weight"
        theirs[name] = routers[key].grad
        assert theirs[name].abs().max() > 1e-5, "a zero gradient would prove nothing"
    same(ours, theirs, tolerance=1e-4)


# ---------------------------------------------------------------- the penalty


def test_penalty_is_the_sum_over_layers_of_what_exceeds_the_target():
    model = routed_model("llama", "attn_token").train()
    ids, mask = random_batch(padding="right")
    with record_routing(model) as log:
        model(ids, attention_mask=mask)
    real = mask.bool()
    shares = {layer: (keep & real).sum() / real.sum() for layer, keep in log.decisions.items()}
    for target in (0.0, 0.3, 0.5, 1.0):
        expected = sum(max(float(share) - target, 0.0) for share in shares.values())
        assert log.penalty(target).item() == pytest.approx(expected, abs=1e-6)
    assert log.capacity() == {
        "total": pytest.approx(float(sum(shares.values())) / 3),
        **{layer: pytest.approx(float(share)) for layer, share in shares.items()},
    }
    for layer, value in log.capacity_tensors().items():
        assert value.shape == () and not value.requires_grad and value.dtype == torch.float32
        assert float(value) == pytest.approx(float(shares[layer]))


@pytest.mark.parametrize("granularity", ["attn_sequence", "attn_token", "block_token", "mlp_sequence"])
@pytest.mark.parametrize("target", [0.1, 0.9])
def test_gradient_of_the_penalty(granularity, target):
    """``∂/∂W ReLU(c − target)`` is the mean of ``s(1−s)·h`` over real rows or tokens, above the target."""
    model = routed_model("llama", granularity, mod_layers=[2]).train()
    ids, mask = random_batch(padding="right")
    features = {}
    for name, module in routed_modules(model).items():
        module.mod_router.register_forward_pre_hook(
            lambda m, args, name=name: features.update({name: args[0].detach()})
        )
    with record_routing(model) as log:
        model(ids, attention_mask=mask)
    log.penalty(target).backward()
    for name, module in routed_modules(model).items():
        h = features[name]
        score = torch.sigmoid(h @ module.mod_router.weight.detach().T)
        per_item = score * (1 - score) * h
        per_item = per_item.mean(0) if h.dim() == 2 else per_item[mask.bool()].mean(0)
        above = float(log.capacity_tensors()[module.mod_key]) > target
        assert above == (target == 0.1)
        assert torch.allclose(module.mod_router.weight.grad[0], per_item * above, atol=1e-6), name


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
