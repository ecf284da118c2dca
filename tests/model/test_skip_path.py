"""The skip path: its closed-form fit, its place on disk, and the first token that always runs."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import random_batch, tiny_model
from tiny_routed import LAYERS, PLAIN, random_skip_paths, routed_model

from router_tuning.errors import UserError
from router_tuning.model import (
    fit_skip_paths,
    force_routing,
    load_routers,
    record_routing,
    route,
    routed_modules,
    save_routers,
)

GRANULARITIES = ("attn_sequence", "attn_token+mlp_token", "block_token")


def batches(count=4, rows=6, tokens=20):
    made = [random_batch(rows, tokens, seed=20 + i, padding="left") for i in range(count)]
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids} for ids, mask in made]


def seen_by(model, data):
    """``h`` and update of every routed module on the tokens that count, in float64, from hooks."""
    found = {name: ([], []) for name in routed_modules(model)}
    for batch in data:
        mask = batch["attention_mask"].bool()
        counted = mask & (mask.cumsum(1) > 1)
        seen, handles = {}, []

        def look(module, args, kwargs, output, seen=seen):
            seen[id(module)] = (args[0] if args else kwargs["hidden_states"], output)

        for module in routed_modules(model).values():
            handles.append(module.register_forward_hook(look, with_kwargs=True))
        with torch.no_grad(), force_routing(model, True):
            model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in routed_modules(model).items():
            hidden, output = seen[id(module)]
            output = output[0] if isinstance(output, tuple) else output
            if module.mod_part == "block":
                output, hidden = output - hidden, module.input_layernorm(hidden)
            found[name][0].append(hidden[counted].double())
            found[name][1].append(output[counted].double())
    return {name: (torch.cat(h), torch.cat(f)) for name, (h, f) in found.items()}


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


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_new_path_is_exactly_zero_and_can_learn(granularity):
    model, plain = (
        routed_model("llama", granularity, skip="low_rank").train(),
        routed_model("llama", granularity).train(),
    )
    ids, mask = random_batch(padding="left")
    kept = mask.bool() & (mask.cumsum(1) == 1)
    forced = {"sequence": kept.any(1) & (torch.arange(3) == 0), "token": kept}
    keep = {n: forced[level] for n in LAYERS for level in set(model.model.mod_config.parts.values())}
    with force_routing(model, keep), force_routing(plain, keep):
        ours, theirs = model(ids, attention_mask=mask, labels=ids), plain(ids, attention_mask=mask)
    if "sequence" not in granularity:
        assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()
    for module in routed_modules(model).values():
        assert module.mod_skip.up.grad.abs().max() > 0 and module.mod_skip.bias.grad.abs().max() > 0


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "block_sequence", "mlp_sequence"])
def test_the_first_token_runs_is_counted_and_teaches_nothing(granularity):
    model = routed_model("llama", granularity, skip="low_rank").train()
    random_skip_paths(model)
    ids, mask = random_batch(padding="left")
    first = mask.bool() & (mask.cumsum(1) == 1)
    with record_routing(model) as log, force_routing(model, False):
        model(ids, attention_mask=mask)
    for keep in log.decisions.values():
        assert torch.equal(keep, first) if keep.dim() == 2 else not keep.any()
    ids, mask = ids[:, :1], torch.ones(3, 1, dtype=torch.long)
    with record_routing(model) as log:
        loss = model(ids, attention_mask=mask, labels=ids).logits.sum() + 10 * log.penalty(0.0)
    if "token" in granularity:
        loss.backward()
        assert all(not m.mod_router.weight.grad.any() for m in routed_modules(model).values())
    dense = copy.deepcopy(model).eval()
    with force_routing(dense, True):
        expected = dense(ids).logits
    with force_routing(dense, False):
        assert torch.allclose(dense(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "cuts"),
    [
        *[(granularity, (0, 2, 3, 4, 12)) for granularity in PLAIN],
        *[(granularity, cuts) for granularity in PLAIN[:2] for cuts in ((0, 5, 12), (0, *range(1, 13)))],
    ],
)
def test_rows_that_begin_in_a_later_chunk(granularity, cuts):
    """Padding may reach beyond the first chunk; the token behind it is still the first."""
    model = routed_model("llama", granularity, skip="low_rank")
    random_skip_paths(model)
    ids, mask = random_batch(padding="left")
    if "sequence" in granularity:  # decisions that do not depend on the cuts
        for module in routed_modules(model).values():
            module.mod_router.register_forward_hook(lambda *_: torch.tensor([[9.0], [-9.0], [-9.0]]))
    with torch.no_grad():
        whole, cache = model(ids, attention_mask=mask, use_cache=False).logits, None
        for start, end in pairwise(cuts):
            out = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache, real = out.past_key_values, mask[:, start:end].bool()
            difference = (out.logits - whole[:, start:end]).abs().amax(-1)
            assert not real.any() or difference[real].max() < 1e-4


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


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("kind", ["mean", "low_rank"])
@pytest.mark.parametrize("onto", ["dense", "routed"])
def test_round_trip(kind, onto, tmp_path):
    model = routed_model("llama", "attn_token+mlp_sequence", skip=kind, skip_rank=3)
    random_skip_paths(model)
    save_routers(model, tmp_path)
    names = {"mean": ["bias"], "low_rank": ["bias", "down", "up"]}[kind]
    assert sorted(name for name in load_file(tmp_path / "router.safetensors") if "mod_skip" in name) == [
        f"model.layers.{n}.{part}.mod_skip.{name}" for n in LAYERS for part in ("mlp", "self_attn") for name in names
    ]
    other = tiny_model()
    if onto == "routed":
        route(other, mod_layers=LAYERS, granularity="attn_token+mlp_sequence", skip=kind, skip_rank=3)
    load_routers(other, tmp_path)
    ids, mask = random_batch(padding="left")
    assert torch.equal(other(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_paths_of_another_kind_or_with_bad_values_are_refused(tmp_path):
    model = routed_model("llama", "attn_token", skip="low_rank", skip_rank=3)
    save_routers(model, tmp_path)
    with pytest.raises(UserError, match="skip_rank is 3"):
        load_routers(route(tiny_model(), mod_layers=LAYERS, granularity="attn_token", skip="low_rank"), tmp_path)
    with torch.no_grad():
        model.model.layers[2].self_attn.mod_skip.bias[0] = float("nan")
    save_routers(model, tmp_path)
    with pytest.raises(UserError, match="layers.2.self_attn.mod_skip.bias holds values that are no finite"):
        load_routers(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": "half"}, "skip 'half' is not one of zero, mean, low_rank"),
        ({"skip_rank": 0}, "skip_rank 0 must be"),
        ({"skip": "mean", "granularity": "expert_token"}, "single experts have no skip path"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        route(tiny_model("mixtral"), mod_layers=LAYERS, **options)
