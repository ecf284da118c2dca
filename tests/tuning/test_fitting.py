"""What routers are fitted on, and the fit: gates, damages, moments and thresholds against ones written out."""

import pytest
import torch
from tiny_models import random_batch, tiny_model
from tiny_routed import random_skip_paths, routed_model
from torch.nn.functional import log_softmax

from router_tuning.model import routed_modules
from router_tuning.model.router import pooled_mean
from router_tuning.tuning.recipes.budget.closed_form import RIDGES, fit_router
from router_tuning.tuning.recipes.budget.damage import drawn, fisher_damage
from router_tuning.tuning.recipes.budget.gates import gates, inputs_seen


def gated_by_hand(dense, modules, paths, decisions, batch):
    """Logits of the dense model with ``P(h) + m·(F(h) − P(h))`` for every routed module, all ``m`` and all ``h``."""
    found, seen, handles = {}, {}, []
    for name, module in modules.items():
        block, path = dense.model.layers[module.mod_layer], paths.get((module.mod_layer, module.mod_part))
        place = {"attn": block.self_attn, "mlp": block.mlp, "block": block}[module.mod_part]

        def mix(_, args, kwargs, output, name=name, path=path, norm=block.input_layernorm, whole=place is block):
            given = args[0] if args else kwargs["hidden_states"]
            hidden, stays = (norm(given), given) if whole else (given, 0)
            seen[name], gate = hidden.detach(), decisions[name].float().requires_grad_()
            found[name] = gate
            runs = (output[0] if isinstance(output, tuple) else output) - stays
            skipped = torch.zeros_like(runs) if path is None else hidden @ path[0] @ path[1] + path[2]
            mixed = stays + skipped + gate[..., None] * (runs - skipped)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        handles.append(place.register_forward_hook(mix, with_kwargs=True))
    logits = dense(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, found, seen


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
    by_hand, by_name, _ = gated_by_hand(dense, modules, paths, decisions, batch)
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


def test_indices_are_drawn_by_their_probability():
    chances = torch.tensor([[0.0, 0.25, 0.0, 0.75], [1.0, 0.0, 0.0, 0.0]]).repeat(4000, 1)
    found = drawn(chances, torch.Generator().manual_seed(0)).view(-1, 2)
    assert set(found[:, 1].tolist()) == {0} and set(found[:, 0].tolist()) == {1, 3}
    assert abs((found[:, 0] == 1).float().mean() - 0.25) < 0.02


@pytest.mark.parametrize("granularity", ["attn_token+mlp_token", "block_token", "attn_sequence+mlp_sequence"])
@pytest.mark.parametrize("skip", ["zero", "low_rank"])
def test_damages_are_squares_of_what_gates_written_out_say(granularity, skip):
    """Of a token, or the mean over the predictions of a sequence, for which targets are drawn four times."""
    dense, model = tiny_model(), routed_model("llama", granularity, skip=skip, skip_rank=3)
    paths, modules, sequence = random_skip_paths(model), routed_modules(model), "sequence" in granularity
    batches = [padded_batch(seed) for seed in range(2)]
    for batch in batches:  # loss from the fourth token on, and not on the last two of the first row
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :3] = batch["labels"][0, -2:] = -100
    before = model(batches[0]["input_ids"], use_cache=False).logits
    found, generator = fisher_damage(model, batches, seed=5), torch.Generator().manual_seed(5)
    expected = {name: ([], []) for name in found}
    for batch in batches:
        learnt, inputs = batch.pop("labels")[:, 1:] != -100, batch
        with torch.no_grad():
            chances = dense(**inputs, use_cache=False).logits[:, :-1][learnt].softmax(-1)
        everything = dict.fromkeys(modules, torch.ones(3, 9, dtype=torch.bool))
        logits, gate, seen = gated_by_hand(dense, modules, paths, everything, inputs)
        likely = log_softmax(logits[:, :-1][learnt], -1)
        targets = [likely.gather(1, drawn(chances, generator)).sum() for _ in range(4 if sequence else 1)]
        slopes = [torch.autograd.grad(target, list(gate.values()), retain_graph=True) for target in targets]
        runs = batch["attention_mask"].bool() & (torch.arange(9) >= int(skip != "zero"))
        decided = runs.clone()
        for row, carries in enumerate(learnt):
            decided[row, int(carries.nonzero().max()) + 1 :] = False
        for name, drawn_slopes in zip(gate, zip(*slopes, strict=True), strict=True):
            hidden, damage = expected[name]
            if sequence:
                squares = [(slope * runs).sum(1).square() / learnt.sum(1) for slope in drawn_slopes]
                hidden.append(pooled_mean(seen[name], batch["attention_mask"].bool()))
                damage.append(0.5 * torch.stack(squares).mean(0))
            else:
                hidden.append(seen[name][decided])
                damage.append(0.5 * drawn_slopes[0].square()[decided])
    for name, (hidden, damage, decided) in found.items():
        torch.testing.assert_close(hidden, torch.cat(expected[name][0]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(damage[:, 0], torch.cat(expected[name][1]), atol=1e-4, rtol=2e-3)
        assert decided.all()
    assert torch.equal(model(batches[0]["input_ids"], use_cache=False).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


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
