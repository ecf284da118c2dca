"""The skip path: its closed-form fit, and its type (what it does: test_equivalence, test_gradient)."""

import pytest
import torch
from tiny_models import logits_of, random_batch
from tiny_routed import random_skip_paths, routed_model

from router_tuning.model import fit, fit_skip_paths, force_routing, routed_modules
from router_tuning.model.skip_path import SkipPath

GRANULARITIES = ("attn_sequence", "attn_token+mlp_token", "block_token")


def batches(count=4, rows=6, tokens=20):
    made = [random_batch(rows, tokens, seed=20 + i, padding="left") for i in range(count)]
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in made]


@torch.no_grad()
def seen_by(model, data):
    """``h`` and update of every routed module on the tokens that count, in float64, from hooks."""
    found = {module: ([], []) for module in routed_modules(model).values()}

    def look(module, args, kwargs, output):
        hidden, output = args[0] if args else kwargs["hidden_states"], output[0] if type(output) is tuple else output
        if module.mod_part == "block":
            output, hidden = output - hidden, module.input_layernorm(hidden)
        counted = (mask.cumsum(1) > 1) & mask.bool()
        for values, these in zip(found[module], (hidden, output), strict=True):
            values.append(these[counted].double())

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in found]
    with force_routing(model, True):
        for batch in data:
            mask = batch["attention_mask"]
            model(batch["input_ids"], attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: tuple(map(torch.cat, found[module])) for name, module in routed_modules(model).items()}


def by_the_book(hidden, update, rank):
    """Ridge regression, then the best rank-r approximation of ``C^{1/2}A`` by its singular vectors."""
    h, f = hidden - hidden.mean(0), update - update.mean(0)
    covariance = h.T @ h / len(h)
    covariance += 1e-2 * covariance.diagonal().mean() * torch.eye(len(covariance))
    full = torch.linalg.inv(covariance) @ (h.T @ f / len(h))
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ values.sqrt().diag() @ vectors.T
    left, singular, right = torch.linalg.svd(root @ full)
    cut = torch.linalg.inv(root) @ left[:, :rank] @ singular[:rank].diag() @ right[:rank]
    return cut, update.mean(0) - hidden.mean(0) @ cut


PROBES = torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
"""Some directions of ``h``, to try a path on."""


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fit_is_reduced_rank_ridge_regression(granularity):
    model, data = routed_model("llama", granularity), batches()
    shares = fit_skip_paths(model, data, rank=4)
    for name, (hidden, update) in seen_by(model, data).items():
        path = routed_modules(model)[name].mod_skip
        cut, bias = by_the_book(hidden, update, 4)
        assert path.down.shape == (32, 4) and path.up.shape == (4, 32)
        assert torch.allclose(path(PROBES), (PROBES.double() @ cut + bias).float(), atol=1e-4)
        missed = (update - hidden @ cut - bias).square().sum() / (update - update.mean(0)).square().sum()
        assert shares[name] == pytest.approx(1 - missed.item(), abs=0.03)
    assert (model.config.mod_skip, model.config.mod_skip_rank) == ("low_rank", 4)


def test_fit_of_the_mean_and_taking_paths_away():
    model, data = routed_model("llama", "mlp_token"), batches()
    plain = logits_of(model)
    fit_skip_paths(model, data, kind="mean")
    for name, (_, update) in seen_by(model, data).items():
        assert torch.allclose(routed_modules(model)[name].mod_skip(PROBES), update.mean(0).float(), atol=1e-5)
    assert fit_skip_paths(model, data, kind="zero") == {} and torch.equal(logits_of(model), plain)


def test_fit_in_several_passes_is_the_same(monkeypatch):
    models = routed_model("llama", "attn_token"), routed_model("llama", "attn_token")
    for model, size in zip(models, (fit._MOMENT_BYTES, 1), strict=True):
        monkeypatch.setattr(fit, "_MOMENT_BYTES", size)
        fit_skip_paths(model, batches(), rank=4)
    for one, several in zip(*(routed_modules(model).values() for model in models), strict=True):
        assert torch.allclose(one.mod_skip(PROBES), several.mod_skip(PROBES), atol=1e-6)


def test_a_new_path_is_exactly_zero_and_can_learn():
    path, hidden = SkipPath(32, 4), torch.randn(2, 3, 32)
    assert not path(hidden).any()
    path(hidden).sum().backward()
    assert path.up.grad.abs().max() > 0 and path.bias.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("dtype", "tokens", "autocast"),
    [(torch.float64, 40, False), (torch.float32, 1, True), (torch.bfloat16, 1, False), (torch.bfloat16, 40, True)],
)
def test_paths_stay_float32_and_give_the_type_that_they_are_given(dtype, tokens, autocast):
    model = routed_model("llama", "attn_sequence+mlp_token", skip="low_rank").to(dtype)
    paths = random_skip_paths(model)
    assert {parameter.dtype for path in paths.values() for parameter in path} == {torch.float32}
    hidden, (down, up, bias) = torch.randn(3, tokens, 32, dtype=dtype), paths[2, "mlp"]
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        given = model.model.layers[2].mlp.mod_skip(hidden)
        model(random_batch()[0])
    rounding = 1e-5 if dtype != torch.bfloat16 and not autocast else 5e-2
    expected = hidden.double() @ down.double() @ up.double() + bias.double()
    assert given.dtype == dtype and (given - expected).abs().max() <= rounding * expected.abs().max()
