"""The skip path: its closed-form fit, its type, and the first token that always runs (on disk: test_saving)."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import random_batch
from tiny_routed import random_skip_paths, routed_model

from router_tuning.model import fit_skip_paths, force_routing, record_routing, routed_modules
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
    for batch in data:
        mask = batch["attention_mask"]
        with force_routing(model, True):
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


def unspoilt(hidden):
    """Some directions of ``h``, to try a path on."""
    return torch.randn(7, hidden, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fit_is_reduced_rank_ridge_regression(granularity):
    model, data = routed_model("llama", granularity), batches()
    shares = fit_skip_paths(model, data, rank=4)
    for name, (hidden, update) in seen_by(model, data).items():
        path = routed_modules(model)[name].mod_skip
        cut, bias = by_the_book(hidden, update, 4)
        assert path.down.shape == (32, 4) and path.up.shape == (4, 32)
        assert torch.allclose(path(unspoilt(32)), (unspoilt(32).double() @ cut + bias).float(), atol=1e-4)
        missed = (update - hidden @ cut - bias).square().sum() / (update - update.mean(0)).square().sum()
        assert shares[name] == pytest.approx(1 - missed.item(), abs=0.03)
    assert (model.config.mod_skip, model.config.mod_skip_rank) == ("low_rank", 4)


def test_fit_of_the_mean_and_taking_paths_away():
    model, data = routed_model("llama", "mlp_token"), batches()
    plain = copy.deepcopy(model)
    fit_skip_paths(model, data, kind="mean")
    for name, (_, update) in seen_by(model, data).items():
        assert torch.allclose(routed_modules(model)[name].mod_skip(unspoilt(32)), update.mean(0).float(), atol=1e-5)
    assert fit_skip_paths(model, data, kind="zero") == {}
    ids, mask = random_batch(padding="left")
    assert torch.equal(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


def test_fit_in_several_passes_is_the_same(monkeypatch):
    one, several = routed_model("llama", "attn_token"), routed_model("llama", "attn_token")
    fit_skip_paths(one, batches(), rank=4)
    monkeypatch.setattr("router_tuning.model.fit._MOMENT_BYTES", 1)
    fit_skip_paths(several, batches(), rank=4)
    for a, b in zip(routed_modules(one).values(), routed_modules(several).values(), strict=True):
        assert torch.allclose(a.mod_skip(unspoilt(32)), b.mod_skip(unspoilt(32)), atol=1e-6)


def test_a_new_path_is_exactly_zero_and_can_learn():
    path, hidden = SkipPath(32, 4), torch.randn(2, 3, 32)
    assert not path(hidden).any()
    path(hidden).sum().backward()
    assert path.up.grad.abs().max() > 0 and path.bias.grad.abs().max() > 0


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "block_sequence", "mlp_sequence"])
def test_the_first_token_runs_is_counted_and_teaches_nothing(granularity):
    model = routed_model("llama", granularity, skip="low_rank")
    random_skip_paths(model)
    ids, mask = random_batch(padding="left")
    first = mask.bool() & (mask.cumsum(1) == 1)
    with record_routing(model) as log, force_routing(model, False):
        model(ids, attention_mask=mask)
    for keep in log.decisions.values():
        assert torch.equal(keep, first) if keep.dim() == 2 else not keep.any()
    alone = []
    for keep in (True, False):  # nothing is left to skip
        with force_routing(model, keep):
            alone.append(model(ids[:, :1]).logits)
    torch.testing.assert_close(*alone)
    with record_routing(model.train()) as log:
        (model(ids[:, :1]).logits.sum() + 10 * log.penalty(0.0)).backward()
    assert "sequence" in granularity or all(not m.mod_router.weight.grad.any() for m in routed_modules(model).values())


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
    assert given.dtype == dtype and torch.allclose(
        given.double(), expected, atol=rounding * expected.abs().max().item()
    )


def test_sequences_packed_into_one_row_each_have_a_first_token():
    model = routed_model("llama", "mlp_token", skip="low_rank")
    ids = random_batch(rows=1)[0]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with record_routing(model) as log, force_routing(model, False):
        model(ids, position_ids=positions, use_cache=False)
    assert log.decisions[2].nonzero()[:, 1].tolist() == [0, 5]
