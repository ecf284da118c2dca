"""Routers in closed form: damages are those of a slow reference, the regression finds what it is made for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import random_skip_paths, routed_model
from torch.nn.functional import log_softmax

from router_tuning.model import routed_modules
from router_tuning.model.router import pooled_mean
from router_tuning.tuning.recipes.budget.closed_form import RIDGES, fit_router
from router_tuning.tuning.recipes.budget.damage import drawn, fisher_damage


def batches(count=2):
    """Loss from the fourth token on, and not on the last two of the first row."""
    found = []
    for seed in range(count):
        ids, mask = random_batch(rows=3, tokens=9, seed=seed, padding="right")
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3], labels[0, -2:] = -100, -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def inputs(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_indices_are_drawn_by_their_probability():
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75], [1.0, 0.0, 0.0, 0.0]]).repeat(4000, 1)
    found = drawn(chances, torch.Generator().manual_seed(0)).view(-1, 2)
    assert set(found[:, 1].tolist()) == {0} and set(found[:, 0].tolist()) == {1, 3}
    assert abs((found[:, 0] == 1).float().mean() - 0.25) < 0.02


def one_module_at_a_time(dense, layer, part, path, batch, targets):
    """``∂ Σ log p(y) / ∂m`` of one module of the dense model by draw, and what its router would see, ``[b, t]``."""
    gate, seen = torch.ones(batch["input_ids"].shape, requires_grad=True), []
    block = dense.model.layers[layer]
    module = {"attn": block.self_attn, "mlp": block.mlp, "block": block}[part]

    def mix(_, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        hidden, stays = (block.input_layernorm(given), given) if part == "block" else (given, 0)
        runs = (output[0] if isinstance(output, tuple) else output) - stays
        skipped = torch.zeros_like(runs) if path is None else hidden @ path[0] @ path[1] + path[2]
        seen.append(hidden)
        mixed = stays + skipped + gate[..., None] * (runs - skipped)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = module.register_forward_hook(mix, with_kwargs=True)
    found = log_softmax(dense(**inputs(batch), use_cache=False).logits[:, :-1][batch["labels"][:, 1:] != -100], -1)
    handle.remove()
    slopes = [torch.autograd.grad(found.gather(1, drawn).sum(), gate, retain_graph=True)[0] for drawn in targets]
    return seen[0].detach(), slopes


@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "block_token", "attn_sequence+mlp_sequence"])
@pytest.mark.parametrize("skip", ["zero", "low_rank"])
def test_damage_of_all_modules_at_once_is_that_of_each_alone(granularity, skip):
    """Of a token, or the mean over the predictions of a sequence, for which targets are drawn four times."""
    dense, model = tiny_model(), routed_model("llama", granularity, skip=skip, skip_rank=3)
    paths, sequence = random_skip_paths(model), "sequence" in granularity
    before = [model(**inputs(batch), use_cache=False).logits for batch in batches()]
    found, generator = fisher_damage(model, batches(), seed=5), torch.Generator().manual_seed(5)
    expected = {name: ([], []) for name in found}
    for batch in batches():
        learnt = batch["labels"][:, 1:] != -100
        with torch.no_grad():
            chances = dense(**inputs(batch), use_cache=False).logits[:, :-1][learnt].softmax(-1)
        targets = [drawn(chances, generator) for _ in range(4 if sequence else 1)]
        runs = batch["attention_mask"].bool() & (torch.arange(9) >= int(skip != "zero"))
        decided = runs.clone()
        for row, carries in enumerate(learnt):
            decided[row, int(carries.nonzero().max()) + 1 :] = False
        for name, module in routed_modules(model).items():
            key = module.mod_layer, module.mod_part
            hidden, slopes = one_module_at_a_time(dense, *key, paths.get(key), batch, targets)
            if sequence:
                slopes = [(slope * runs).sum(1).square() / learnt.sum(1) for slope in slopes]
                expected[name][0].append(pooled_mean(hidden, batch["attention_mask"].bool()))
                expected[name][1].append(0.5 * torch.stack(slopes).mean(0))
            else:
                expected[name][0].append(hidden[decided])
                expected[name][1].append(0.5 * slopes[0].square()[decided])
    for name, (hidden, damage, decided) in found.items():
        torch.testing.assert_close(hidden, torch.cat(expected[name][0]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(damage[:, 0], torch.cat(expected[name][1]), atol=1e-4, rtol=2e-3)
        assert decided.all()
    for batch, logits in zip(batches(), before, strict=True):
        assert torch.equal(model(**inputs(batch), use_cache=False).logits, logits)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_module_that_does_nothing_has_the_least_damage():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(0.01)
    model = routed_model(granularity="attn_token+mlp_token", model=model)
    mean = {name: damage.mean() for name, damage in fisher_damage(model, batches(6)).items()}
    least, second = sorted(mean.values())[:2]
    assert mean["2.mlp"] == least < 0.01 * second


@pytest.mark.parametrize("told_apart", [True, False])
def test_regression_finds_what_damage_depends_on(told_apart):
    """``d = exp(w·h + b)·χ²``, far from centred; where there is nothing to find, next to nothing is predicted."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(8) + 0.1 * torch.randn(8, 8, generator=generator)
    hidden = torch.randn(6000, 8, generator=generator) @ mixing + 4
    weight = torch.linalg.solve(mixing, 0.35 * torch.randn(8, generator=generator)) * told_apart
    truth = (hidden - 4) @ weight - 5
    fit = fit_router(hidden, truth.exp() * torch.randn(6000, generator=generator).square())[0]
    predicted = hidden @ fit.weight + fit.bias
    assert float(predicted.exp().mean() / truth.exp().mean()) == pytest.approx(1, abs=0.15)
    if told_apart:
        assert torch.corrcoef(torch.stack([predicted, truth]))[0, 1] > 0.97 and predicted.std() > 0.8 * truth.std()
    else:
        assert predicted.std() < 0.1


@pytest.mark.parametrize(
    ("tokens", "spread", "weight", "times", "best"), [(20_000, 0.2, 4.0, 1, 0.15), (120, 4.0, 0.6, 20, 5.0)]
)
def test_the_ridge_is_that_of_least_deviance_on_tokens_left_out(tokens, spread, weight, times, best):
    """Much data whose signal has little variance want little of it, few data whose signal has much want much."""
    generator, deviance = torch.Generator().manual_seed(1), dict.fromkeys(RIDGES, 0.0)
    for _ in range(times):
        hidden = torch.randn(tokens, 24, generator=generator)
        hidden[:, 0] *= spread
        damage = torch.exp(weight * hidden[:, 0] - 5) * torch.randn(tokens, generator=generator).square()
        for ridge, fit in zip(RIDGES, fit_router(hidden, damage), strict=True):
            deviance[ridge] += fit.deviance
    assert min(deviance, key=deviance.get) == best
