"""Calibrated thresholds reach the budgets asked for, in real forward passes."""

import pytest
import torch
from refused import refused
from tiny_models import random_batch
from tiny_routed import random_skip_paths, routed_model

from router_tuning.errors import UserError
from router_tuning.model import dial as dial_module
from router_tuning.model import load_routers, record_routing, routed_modules, save_routers, set_thresholds
from router_tuning.model.dial import calibrate
from router_tuning.model.flops import flops_share
from router_tuning.model.saving import thresholds_for


def batches(count=3, rows=40, seed=5):
    made = [random_batch(rows, 12, seed=seed + i) for i in range(count)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in made]


@torch.no_grad()
def reached(model, data):
    """Share of rows or tokens that run, by router, over all data."""
    with record_routing(model) as log:
        for batch in data:
            model(**batch, use_cache=False)
    return {name: log.capacity()[module.mod_key] for name, module in routed_modules(model).items()}


def mean(shares):
    return sum(shares.values()) / len(shares)


@pytest.mark.parametrize(
    ("granularity", "skip"),
    [(g, "zero") for g in ("attn_token", "block_sequence")]
    + [(g, "low_rank") for g in ("attn_sequence", "attn_token+mlp_token")],
)
def test_every_budget_is_reached_on_the_calibration_data(granularity, skip, tmp_path):
    def turned(**budget):
        fresh = routed_model("llama", granularity, skip=skip, skip_rank=4)
        return load_routers(fresh, tmp_path, **budget)

    model, data = routed_model("llama", granularity, skip=skip, skip_rank=4), batches()
    random_skip_paths(model)
    dial = calibrate(model, data)
    save_routers(model, tmp_path, extra={"dial": dial})
    least = mean(reached(turned(capacity=0.0), data))
    for budget in (0.015, 0.13, 0.5, 0.9, 0.985, 1.0):
        near = 0.02 if 0.1 < budget < 0.95 else 0.007  # scores lie far apart at the ends
        assert abs(mean(reached(turned(capacity=budget), data)) - max(budget, least)) <= near
        share = dial["flops"][0] + budget * (1 - dial["flops"][0])
        model = turned(flops=share)
        assert abs(flops_share(model, reached(model, data)) - share) <= 0.02 * (1 - dial["flops"][0])
    assert (least > 0) == (skip == "low_rank" and "token" in granularity), "first tokens always run"
    with refused("out of reach", UserError):
        turned(flops=dial["flops"][0] - 0.01)


def test_a_start_sets_the_differences_between_routers():
    model, data = routed_model("llama", "attn_token"), batches()
    names = list(routed_modules(model))
    start = {"capacity": [0.0, 1.0], "logit": {name: [float(i), float(i)] for i, name in enumerate(names)}}
    dial = calibrate(model, data, start=start, grid=(0.0, 0.5, 1.0))
    first, last = dial["logit"][names[0]][1], dial["logit"][names[-1]][1]
    assert last - first == pytest.approx(len(names) - 1)
    set_thresholds(model, thresholds_for({"dial": dial}, 0.5, "here"))
    assert abs(mean(reached(model, data)) - 0.5) <= 0.02


def test_decisions_that_move_all_scores_behind_them_are_solved_too(monkeypatch):
    """A router whose scores lie close together, far from those of the next, which follow its decisions row by row."""
    model, rows = routed_model("llama", "attn_sequence"), torch.linspace(0, 0.1, 48)
    modules = routed_modules(model)
    first, *others = modules

    def logits(_, __):
        runs = rows >= modules[first].mod_logit
        return {first: rows, **{name: torch.where(runs, 7.0, -9.0) + rows for name in others}}

    monkeypatch.setattr(dial_module, "router_logits", logits)
    found = calibrate(model, [], start={"capacity": [0.0, 1.0], "logit": {n: [0.0, 0.0] for n in modules}})
    for budget in (0.1, 0.3, 0.5, 0.7, 0.9):
        dial_module._set(modules, dial_module.logits_at(found, budget))
        assert abs(dial_module.capacity_at(logits(0, 0), dial_module.logits_at(found, budget)) - budget) <= 0.03


def test_routers_that_tell_nothing_apart_are_named():
    model = routed_model("llama", "attn_token")
    for module in routed_modules(model).values():
        torch.nn.init.zeros_(module.mod_router.weight)
    with refused("same score"):
        calibrate(model, batches(1))
