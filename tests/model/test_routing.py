"""route and unroute: which layers, which granularities, what is refused, what stays exactly as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_reference import check, close
from refused import refused
from tiny_models import FAMILIES, MOE, logits_of, random_batch, state_of, tiny_model
from tiny_routed import KINDS, LAYERS, routed_model, with_reference
from transformers import AutoModelForCausalLM

from router_tuning.model import (
    force_routing,
    is_routed,
    record_routing,
    route,
    routed_modules,
    set_thresholds,
    unroute,
)
from router_tuning.model.configuration_mod import parse_granularity, select_layers
from router_tuning.model.saving import load_routers, save_routers

WHERE = {"attn": "self_attn.", "mlp": "mlp.", "block": "", "expert": "mlp.experts."}
BY_PART = {"attn": [0, 3], "mlp": [1, 3, 4]}
BOTH = "attn_token+mlp_token"


def kinds(family: str) -> list[tuple[str, str]]:
    """All granularities that a family has with their policies of keys, and combinations."""
    experts = [("expert_token", "keep"), ("attn_token+expert_token", "drop")] if family in MOE else []
    return [*KINDS, ("attn_sequence+mlp_token", "keep"), *experts]


# ---------------------------------------------------------------- which layers


@pytest.mark.parametrize(
    ("layers", "n", "expected"), [(32, 16, range(15, 31)), (5, 4, [0, 1, 2, 3]), (5, 1, [3]), (12, 6, range(5, 11))]
)
def test_the_deepest_n_layers_except_the_last_are_routed(layers, n, expected):
    assert select_layers(layers, n, None) == list(expected)


def test_listed_layers_override_their_number():
    model = route(tiny_model(), mod_n=1, mod_layers=[4, 0])
    assert list(routed_modules(model)) == ["0.attn", "4.attn"] and model.config.mod_layers == [0, 4]
    both = route(tiny_model(), mod_layers={"mlp": [1, 2], "attn": [2, 1]}, granularity=BOTH)
    assert both.config.mod_layers == [1, 2], "equal lists are one"


@pytest.mark.parametrize(
    ("granularity", "policy"),
    [(BOTH, "keep"), ("attn_token+mlp_sequence", "drop"), ("attn_sequence+mlp_token", "keep")],
)
def test_parts_may_be_routed_in_layers_of_their_own(granularity, policy, tmp_path):
    """Everything that reads the layers copes: caches, saving, forcing, thresholds, and the way back."""
    model, reference = with_reference("llama", granularity, policy, skip="low_rank", mod_layers=BY_PART)
    names = ["0.attn", "1.mlp", "3.attn", "3.mlp", "4.mlp"]
    assert list(routed_modules(model)) == names
    check(model, reference)
    with force_routing(model, {(0, "attn"): True, (1, "mlp"): True, 3: True, (4, "mlp"): True}):
        close(logits_of(model), logits_of(tiny_model()), random_batch(padding="left")[1], tolerance=1e-5)
    with refused("names no router: .0, 'mlp'"), force_routing(model, {(0, "mlp"): True}):
        pass
    save_routers(model, tmp_path)
    model.save_pretrained(tmp_path / "whole")
    loaded = load_routers(tiny_model(), tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    for again in loaded:
        assert again.config.mod_layers == BY_PART and list(routed_modules(again)) == names
        assert torch.equal(logits_of(again), logits_of(model))
    set_thresholds(model, dict.fromkeys(names, 0.4))
    assert not any("mod_" in name for name in unroute(model).state_dict())


def test_thresholds_per_router():
    model = route(tiny_model(), mod_layers=LAYERS, threshold={"1.attn": 0.1, "2.attn": 0.5, "3.attn": 0.9})
    with torch.no_grad(), record_routing(model) as log:
        model(random_batch()[0])
    assert log.capacity() == {"total": pytest.approx(2 / 3), 1: 1.0, 2: 1.0, 3: 0.0}


# ---------------------------------------------------------------- what is refused

REFUSED = [
    ({"mod_n": None}, "mod_n.*mod_layers"),
    *[({"mod_n": n}, rf"mod_n {n} .*5 layers") for n in (5, 6, 0, -1)],
    *[({"mod_layers": wrong}, "mod_layers") for wrong in ([], [0, 0], [-1], [5], ["1"], "12", [1.0], [True, 2], 3)],
    ({"mod_layers": {"attn": [1]}, "granularity": BOTH}, "mod_layers names attn; the granularity routes attn, mlp"),
    ({"mod_layers": {"attn": [1], "mlp": [9]}, "granularity": BOTH}, "mod_layers .9. must be distinct indices in 0…4"),
    ({"mod_layers": {"attn": [1], "mlp": []}, "granularity": BOTH}, "mod_layers .. must be distinct"),
    *[({"granularity": typo}, typo) for typo in ("atn_sequence", "attn-sequence", "attn", "ATTN_TOKEN")],
    *[({"granularity": wrong}, "''") for wrong in ("", "attn_token+")],
    ({"granularity": None}, "None"),
    ({"granularity": "attn_token+attn_sequence"}, "twice"),
    ({"granularity": "block_token+mlp_token"}, "route it alone"),
    ({"granularity": "mlp_token+expert_token"}, "route one of the two"),
    *[({"threshold": wrong}, "threshold") for wrong in (1.5, float("nan"), "high", {}, {"1.attn": 0.5})],
    ({"threshold": dict.fromkeys(f"{n}.attn" for n in range(4))}, "threshold"),
    *[({field: "wrong"}, field) for field in ("router_pooling", "kv_policy", "target_capacity", "skip")],
    *[
        ({field: wrong}, field)
        for field, wrong in (("target_capacity", 1.1), ("gradient_scale", "x"), ("skip_rank", 0))
    ],
    ({"skip": "mean", "granularity": "expert_token"}, "single experts have no skip path"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_cannot_be_routed_is_refused_and_leaves_the_model_dense(options, words):
    model = tiny_model()
    before = state_of(model)
    with refused(words):
        route(model, **{"mod_n": 2, **options})
    assert not is_routed(model) and state_of(model) == before


def test_what_is_routed_already_wrapped_or_dense_is_refused():
    model = route(tiny_model(), mod_n=2)
    wrapper = torch.nn.Sequential(model)
    for words, refuse in [
        ("unroute", lambda: route(model, mod_n=2)),
        ("Sequential: unwrap", lambda: unroute(wrapper)),
        ("not routed", lambda: unroute(tiny_model())),
        ("not routed", lambda: record_routing(tiny_model()).__enter__()),
        ("not routed", lambda: force_routing(tiny_model(), True).__enter__()),
        ("transformers model", lambda: route(torch.nn.Linear(2, 2), mod_n=1)),
    ]:
        with refused(words):
            refuse()
    assert is_routed(wrapper)


# ---------------------------------------------------------------- in and out again


@pytest.mark.parametrize("family", FAMILIES)
def test_only_router_weights_are_new_and_unroute_takes_all_back(family):
    model = tiny_model(family, "eager")
    plain, before, logits = {**model.state_dict()}, state_of(model), logits_of(model)
    for granularity in dict(kinds(family)):
        assert is_routed(routed_model(granularity=granularity, model=model))
        parts, parameters = parse_granularity(granularity), dict(model.named_parameters())
        expected = {
            f"model.layers.{n}.{WHERE[part]}mod_router.weight": (4 if part == "expert" else 1, 32)
            for n in LAYERS
            for part in parts
        }
        new = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in plain}
        assert new == expected and parameters.keys() >= new.keys() and plain.keys() < model.state_dict().keys()
        assert not torch.equal(logits_of(model), logits)
        assert unroute(model) is model and not is_routed(model)
        assert state_of(model) == before and torch.equal(logits_of(model), logits)
        assert not [name for module in model.modules() for name in vars(module) if name.startswith("mod_")]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_dense_model_exactly(family):
    dense, (ids, mask) = tiny_model(family, "eager"), random_batch(padding="left")
    whole, padded, real = dense(ids).logits, dense(ids, attention_mask=mask).logits, mask.bool()
    for granularity, policy in kinds(family):
        model = route(copy.deepcopy(dense), mod_layers=LAYERS, granularity=granularity, kv_policy=policy)
        for use_cache in (True, False):
            assert torch.equal(model(ids, use_cache=use_cache).logits, whole), (granularity, policy)
        exact = model(ids, attention_mask=mask, use_cache=False).logits
        if policy == "keep":
            assert torch.equal(exact[real], padded[real]), granularity
        else:  # padding is never kept, so its rows are packed: the same sums in another shape
            assert (exact - padded)[real].abs().max() < 1e-5
