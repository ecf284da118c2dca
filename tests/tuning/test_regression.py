"""Routers by regression: gates against a model with gates written out, moments and thresholds against plain counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import random_skip_paths, routed_model

from router_tuning.model import routed_modules
from router_tuning.tuning.recipes.budget.closed_form import RIDGE
from router_tuning.tuning.recipes.budget.gates import SLOPE, gates, inputs_seen
from router_tuning.tuning.recipes.budget.regression import Policy, RegressionTrainer, curve_of


def gated_by_hand(dense, modules, paths, decisions, batch):
    """Logits of the dense model with ``P(h) + m·(F(h) − P(h))`` in place of every routed module, and all ``m``."""
    found, handles = {}, []
    for name, module in modules.items():
        layer = dense.model.layers[module.mod_layer]
        down, up, bias = paths[module.mod_layer, module.mod_part]

        def mix(_, args, kwargs, output, name=name, path=(down, up, bias)):
            hidden = args[0] if args else kwargs["hidden_states"]
            gate = found[name] = decisions[name].float().requires_grad_()
            runs = output[0] if isinstance(output, tuple) else output
            skipped = hidden @ path[0] @ path[1] + path[2]
            mixed = skipped + gate[..., None] * (runs - skipped)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        part = {"attn": layer.self_attn, "mlp": layer.mlp}[module.mod_part]
        handles.append(part.register_forward_hook(mix, with_kwargs=True))
    logits = dense(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, found


def test_gates_decide_by_rows_and_get_the_gradient_of_the_decisions():
    dense, model = tiny_model(), routed_model("llama", "attn_token+mlp_token", skip="low_rank", skip_rank=3)
    paths, modules = random_skip_paths(model), routed_modules(model)
    ids, mask = random_batch(rows=3, tokens=9, padding="right")
    batch = {"input_ids": ids, "attention_mask": mask}
    bias = {name: 0.1 * number for number, name in enumerate(modules)}
    towards = torch.randn(*ids.shape, 61, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    threshold = torch.tensor([-1e3, 0.2, 1e3])
    before = {name: module.mod_logit for name, module in modules.items()}
    with gates(modules, bias, threshold) as found:
        logits = model.train()(**batch, use_cache=False).logits
    gradients = torch.autograd.grad((logits * towards).sum(), found.leaves())
    decisions = {}
    for name, score in zip(modules, found.scores(), strict=True):
        torch.testing.assert_close(score, modules[name].mod_router(found.seen[name][0])[..., 0] + bias[name])
        decisions[name] = (score >= threshold[:, None]) & mask.bool()
        decisions[name][:, 0] = True  # the first token of each row
    assert all(d[2].sum() == 1 and d[0].sum() == 9 for d in decisions.values())
    assert any(1 < d[1].sum() < 7 for d in decisions.values())
    assert found.decided.sum() == mask.sum() - 3
    by_hand, by_name = gated_by_hand(dense, modules, paths, decisions, batch)
    torch.testing.assert_close(logits[mask.bool()], by_hand[mask.bool()], atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad((by_hand * towards).sum(), [by_name[name] for name in modules])
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours[..., 0][found.decided] / SLOPE, theirs[found.decided], atol=1e-3, rtol=1e-3)
        assert not ours[..., 0][~found.decided].any()
    assert before == {name: module.mod_logit for name, module in modules.items()}


def test_what_routers_see_is_summed_up_as_mean_and_ridged_covariance():
    model = routed_model("llama", "attn_token", skip="low_rank", skip_rank=3)
    pairs = [random_batch(rows=3, tokens=9, seed=seed, padding="right") for seed in range(2)]
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in pairs]
    bias = dict.fromkeys(routed_modules(model), 0.5)
    seen, scores = inputs_seen(model, batches, bias)
    for number, (name, module) in enumerate(routed_modules(model).items()):
        inputs = []
        handle = module.mod_router.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        with torch.no_grad(), gates(routed_modules(model), bias, None):
            for batch in batches:
                model(**batch, use_cache=False)
        handle.remove()
        real = [batch["attention_mask"][:, 1:] == 1 for batch in batches]
        tokens = torch.cat([hidden[:, 1:][chosen] for hidden, chosen in zip(inputs, real, strict=True)])
        covariance = torch.cov(tokens.T, correction=0)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
        torch.testing.assert_close(seen[name].mean, tokens.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[name].factor @ seen[name].factor.T, covariance, atol=1e-4, rtol=1e-3)
        assert sorted(scores[number].tolist()) == pytest.approx(
            sorted((module.mod_router(tokens)[:, 0] + 0.5).tolist()), abs=1e-4
        )


def test_thresholds_of_a_curve_leave_the_share_of_the_operations_that_each_stands_for():
    scores = torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)) + torch.tensor([[0.0], [1.0], [-1.0]])
    saved, grid = torch.tensor([0.1, 0.3, 0.2]), torch.tensor([0.3, 0.5, 0.9])
    for budget, threshold in zip(grid, curve_of(scores, saved, grid), strict=True):
        runs = ((scores >= threshold).float().mean(1) * saved).sum() / saved.sum()
        assert float(runs) == pytest.approx(float(budget), abs=2e-3)


def test_thresholds_follow_the_scores_to_where_a_step_leaves_them():
    """Read off scores of before it, they would lag behind all that routers learn."""
    model, generator = routed_model("llama", "attn_token"), torch.Generator().manual_seed(0)
    modules = routed_modules(model)
    seen = [torch.randn(40, 32, generator=generator) for _ in modules]
    trainer = RegressionTrainer.__new__(RegressionTrainer)
    trainer.modules, trainer.saved = modules, torch.full((len(modules),), 0.1)
    trainer.args, trainer.policy = (
        SimpleNamespace(device=torch.device("cpu")),
        Policy(dict.fromkeys(modules, 0.5), 0.5),
    )
    trainer.policy.curve = before = torch.zeros_like(trainer.policy.grid)

    def scores() -> torch.Tensor:
        pairs = zip(modules.items(), seen, strict=True)
        return torch.stack([m.mod_router(h)[:, 0] + trainer.policy.bias[name] for (name, m), h in pairs]).detach()

    trainer._kept = [(scores(), seen)]
    trainer._pending = {
        "weight": 1e5 * torch.randn(len(modules), 32, generator=generator).double(),
        "bias": 1e5 * torch.arange(1.0, len(modules) + 1).double(),
        "ratio": torch.zeros(5, 2).double(),
        "rows": torch.zeros(5).double(),
        "tokens": torch.tensor([40.0]).double(),
    }
    old = scores()
    trainer._apply()
    assert (scores() - old).abs().mean() > 10
    expected = 0.8 * before + 0.2 * curve_of(scores(), trainer.saved, trainer.policy.grid)
    torch.testing.assert_close(trainer.policy.curve, expected, atol=1e-2, rtol=1e-3)
