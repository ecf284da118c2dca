"""Routers by regression: gates against a model with gates written out, moments and thresholds against plain counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import random_skip_paths, routed_model

from router_tuning.model import routed_modules
from router_tuning.tuning.recipes.budget.budgets import Budgets
from router_tuning.tuning.recipes.budget.gates import curve_of, gates, inputs_seen
from router_tuning.tuning.recipes.budget.regression import RegressionTrainer


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


def padded_batch(seed=0):
    ids, mask = random_batch(rows=3, tokens=9, padding="right", seed=seed)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gates_decide_by_rows_and_get_the_gradient_of_the_decisions(level):
    dense = tiny_model()
    model = routed_model("llama", f"attn_{level}+mlp_{level}", skip="low_rank", skip_rank=3)
    paths, modules, batch = random_skip_paths(model), routed_modules(model), padded_batch()
    mask = batch["attention_mask"].bool()
    bias = {name: 0.1 * number for number, name in enumerate(modules)}
    towards = torch.randn(*mask.shape, 61, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    model.requires_grad_(False)
    threshold = torch.tensor([-1e3, 0.2, 1e3])
    before = {name: module.mod_logit for name, module in modules.items()}
    with gates(modules, bias, threshold) as found:
        logits = model.train()(**batch, use_cache=False).logits
    leaves = [found[name].leaf for name in modules]
    gradients = torch.autograd.grad((logits * towards).sum(), leaves)
    decisions = {}
    for name, gate in found.items():
        torch.testing.assert_close(gate.score, modules[name].mod_router(gate.hidden) + bias[name])
        decided = gate.score[:, 0].view(3, -1) >= threshold[:, None]
        decisions[name] = decided & mask
        decisions[name][:, 0] = True  # the first token of each row
    assert all(d[2].sum() == 1 and d[0].sum() == 9 for d in decisions.values())
    if level == "token":
        assert any(1 < d[1].sum() < 7 for d in decisions.values())
    by_hand, by_name = gated_by_hand(dense, modules, paths, decisions, batch)
    torch.testing.assert_close(logits[mask], by_hand[mask], atol=1e-4, rtol=1e-4)
    expected = torch.autograd.grad((by_hand * towards).sum(), [by_name[name] for name in modules])
    says = mask & (torch.arange(9) > 0)
    for name, ours, theirs in zip(modules, gradients, expected, strict=True):
        gate = found[name]
        theirs = (theirs * says).flatten() if level == "token" else (theirs * says).sum(1)
        torch.testing.assert_close(gate.gradient(ours)[:, 0], theirs, atol=1e-3, rtol=1e-3)
        assert gate.decided[:, 0].tolist() == (says.flatten().tolist() if level == "token" else [True] * 3)
        assert gate.where(says & (torch.arange(9) < 2)).sum() == 3
    assert before == {name: module.mod_logit for name, module in modules.items()}


def test_gates_of_experts_get_the_gradient_of_each_assignment():
    model, batch, seen = routed_model("mixtral", "expert_token"), padded_batch(), {}
    modules, towards = routed_modules(model), torch.randn(27, 61, generator=torch.Generator().manual_seed(0))

    def weigh(module, args):
        seen[module] = args[1], torch.ones_like(args[2]).requires_grad_()
        return (*args[:2], args[2] * seen[module][1])

    for module in modules.values():
        module.register_forward_pre_hook(weigh)
    with gates(modules, dict.fromkeys(modules, 0.0), None) as found:
        logits = model.eval()(**batch, use_cache=False).logits
    leaves, weights = [found[name].leaf for name in modules], [seen[module][1] for module in modules.values()]
    gradients = torch.autograd.grad((logits.flatten(0, 1) * towards).sum(), [*leaves, *weights])
    real = batch["attention_mask"].bool().flatten()
    for (name, module), ours, theirs in zip(modules.items(), gradients, gradients[len(leaves) :], strict=False):
        chosen = seen[module][0]
        torch.testing.assert_close(
            found[name].gradient(ours).gather(1, chosen)[real], theirs[real], atol=1e-4, rtol=1e-3
        )
        assert found[name].decided.sum() == 2 * real.sum() and found[name].decided.gather(1, chosen)[real].all()


@pytest.mark.parametrize(("family", "granularity"), [("llama", "attn_token"), ("mixtral", "expert_token")])
def test_what_routers_see_is_summed_up_as_mean_and_ridged_covariance(family, granularity):
    """Of experts, whose weights carry the constant, too: as zero, and as mean square with the same ridge."""
    path = {} if granularity == "expert_token" else {"skip": "low_rank", "skip_rank": 3}
    model = routed_model(family, granularity, **path)
    batches = [padded_batch(seed) for seed in range(2)]
    bias = dict.fromkeys(routed_modules(model), 0.5)
    seen, scores = inputs_seen(model, batches, bias)
    for name, module in routed_modules(model).items():
        inputs = []
        handle = module.mod_router.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
        with torch.no_grad(), gates(routed_modules(model), bias, None):
            for batch in batches:
                model(**batch, use_cache=False)
        handle.remove()
        real = [batch["attention_mask"] == 1 for batch in batches]
        for mask in real if path else []:
            mask[:, 0] = False
        tokens = torch.cat([hidden.reshape(3, 9, -1)[chosen] for hidden, chosen in zip(inputs, real, strict=True)])
        covariance = torch.cov(tokens.T, correction=0)
        ridge = 0.3 * covariance.diagonal().mean() * torch.eye(len(covariance))
        mean, square = (tokens.mean(0), covariance) if path else (torch.zeros(32), tokens.T @ tokens / len(tokens))
        torch.testing.assert_close(seen[name].mean, mean, atol=1e-5, rtol=1e-4)
        factor = seen[name].factor(0.3)
        torch.testing.assert_close(factor @ factor.T, square + ridge, atol=1e-4, rtol=1e-3)
        if path:
            expected = sorted((module.mod_router(tokens)[:, 0] + 0.5).tolist())
            assert sorted(scores[name].tolist()) == pytest.approx(expected, abs=1e-4)
        assert len(scores[name]) == len(tokens) * (1 if path else 2)


def test_thresholds_of_a_curve_leave_the_share_of_the_operations_that_each_stands_for():
    """Routers weigh as they are told, however many decisions each has."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(1000 * (n + 1), generator=generator) + shift for n, shift in enumerate((0.0, 1.0, -1.0))]
    saved, grid = [0.1, 0.3, 0.2], torch.tensor([0.3, 0.5, 0.9])
    for budget, threshold in zip(grid, curve_of(scores, saved, grid), strict=True):
        runs = sum(w * float((part >= threshold).float().mean()) for w, part in zip(saved, scores, strict=True))
        assert runs / sum(saved) == pytest.approx(float(budget), abs=2e-3)


def test_thresholds_follow_the_scores_to_where_a_step_leaves_them():
    """Read off scores of before it, they would lag behind all that routers learn."""
    model, generator = routed_model("llama", "attn_token"), torch.Generator().manual_seed(0)
    modules = routed_modules(model)
    seen = {name: torch.randn(40, 32, generator=generator) for name in modules}
    trainer = RegressionTrainer.__new__(RegressionTrainer)
    trainer.modules, trainer.saved, trainer.prior = modules, [0.1] * len(modules), dict.fromkeys(modules, 3000.0)
    trainer.args, trainer.policy = (
        SimpleNamespace(device=torch.device("cpu")),
        Budgets(dict.fromkeys(modules, 0.5), ridge=0.5, lowest=0.5),
    )
    trainer.policy.curve = before = torch.zeros_like(trainer.policy.grid)

    def scores() -> dict[str, torch.Tensor]:
        return {n: (m.mod_router(seen[n]) + trainer.policy.bias[n]).detach() for n, m in modules.items()}

    old, everything = scores(), torch.ones(40, 1, dtype=torch.bool)
    trainer._kept = [{name: (old[name].clone(), seen[name], everything) for name in modules}]
    steps = {f"{n} step": 1e5 * torch.randn(1, 33, generator=generator).double() for n in modules}
    counts = {f"{n} count": torch.tensor([40.0]).double() for n in modules}
    trainer._pending = {**steps, **counts, "ratio": torch.zeros(5, 2).double(), "rows": torch.zeros(5).double()}
    trainer._apply()
    now = [values[:, 0] for values in scores().values()]
    assert all((ours - theirs[:, 0]).abs().mean() > 10 for ours, theirs in zip(now, old.values(), strict=True))
    expected = 0.8 * before + 0.2 * curve_of(now, trainer.saved, trainer.policy.grid)
    torch.testing.assert_close(trainer.policy.curve, expected, atol=1e-2, rtol=1e-3)
