"""Token level of ``--recipe budget``: drawn budgets hold, the multiplier finds the mean benefit, runs resume."""

from __future__ import annotations

import shutil

import pytest
import tiny_tuning
import torch
from safetensors.torch import load_file
from tiny_models import random_batch, tiny_model

from router_tuning.errors import UserError
from router_tuning.model import record_routing, route, routed_modules
from router_tuning.model.router import ModRouter
from router_tuning.tuning.recipes.budget.thresholds import biased, share_threshold
from router_tuning.tuning.recipes.budget.training import CapacityMultiplier

SETTINGS = {"recipe": "budget", "granularity": "attn_token", "router_dir": None, "gradient_scale": 0.1, "skip_rank": 4}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_a_share_of_the_logits_reaches_the_threshold(share, weights):
    """Routers weigh as they are told, however many rows or tokens each saw."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1000, generator=generator), torch.randn(4000, generator=generator) + 1]
    threshold = share_threshold(logits, share, weights)
    first, second = (float((part >= threshold).float().mean()) for part in logits)
    one, other = weights or (1, 1)
    assert (one * first + other * second) / (one + other) == pytest.approx(share, abs=2e-3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = route(tiny_model("llama", num_hidden_layers=5), mod_n=3, granularity="attn_token").train()
    for module in routed_modules(model).values():
        torch.nn.init.normal_(module.mod_router.weight, std=0.1)
    return model


def test_the_multiplier_becomes_the_mean_benefit_of_capacity(model):
    """A loss of ``-0.6`` per unit of mean capacity: from any start it ends there, and the gradient is gone."""
    ids, mask = random_batch(rows=4, tokens=12)
    multiplier = CapacityMultiplier(2.0, 0.3)
    for _ in range(40):
        model.zero_grad()
        with record_routing(model) as log:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        multiplier.watch(log)
        mean = torch.stack([record.capacity() for records in log.records.values() for record in records]).mean()
        (multiplier.value * mean - 0.6 * mean).backward()
        multiplier.on_step_end(None, None, None)
    assert float(multiplier.value) == pytest.approx(0.6, abs=0.02)
    assert all(module.mod_router.weight.grad.abs().max() < 1e-2 for module in routed_modules(model).values())


def test_a_bias_learns_like_a_weight_and_leaves_no_trace(model):
    routers = {name: module.mod_router for name, module in routed_modules(model).items()}
    hidden = torch.randn(7, next(iter(routers.values())).weight.shape[1])
    before = {name: router(hidden) for name, router in routers.items()}
    with biased(model, {"1.attn": 0.5, "2.attn": -1.0}):
        for name, bias in {"1.attn": 0.5, "2.attn": -1.0, "3.attn": 0.0}.items():
            torch.testing.assert_close(routers[name](hidden), before[name] + bias)
        routers["1.attn"](hidden).sum().backward()
        assert routers["1.attn"].bias.grad == 7 and routers["1.attn"].weight.grad.abs().max() > 0
    for name, router in routers.items():
        assert type(router) is ModRouter and set(router.state_dict()) == {"weight"}
        assert torch.equal(router(hidden), before[name])


def test_training_runs_at_the_drawn_budgets_and_resumes_with_the_same_bits(parts, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    tiny_tuning.tune(parts, whole, **SETTINGS)
    later = [line["capacity"] for line in tiny_tuning.history(whole)[1:]]
    # Thresholds come from a dense pass, the log from the routed one, and few tokens make a micro-batch.
    assert later and all(0.0 <= capacity <= 0.85 for capacity in later)
    run.mkdir()
    shutil.copytree(whole / "checkpoint-4", run / "checkpoint-4")
    tiny_tuning.tune(parts, run, resume_from_checkpoint="auto", **SETTINGS)
    assert (run / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()


def test_settings_are_those_of_the_command_line(parts, tmp_path):
    """Budgets from 0.9 on: nearly everything runs. Paths that train move, and others stay as they were fitted."""
    runs = {"high": {"lowest_budget": 0.9}, "low": {"lowest_budget": 0.1, "highest_budget": 0.3}}
    for name, further in {**runs, "paths": {"train_skip": True}}.items():
        tiny_tuning.tune(parts, tmp_path / name, **{**SETTINGS, "train_skip": False, **further})
    high, low = ([line["capacity"] for line in tiny_tuning.history(tmp_path / name)] for name in ("high", "low"))
    assert min(high) > 0.8 and 0.5 > max(low)
    fixed, also, moved = (load_file(tmp_path / name / "router.safetensors") for name in ("high", "low", "paths"))
    for name in (name for name in fixed if "mod_skip" in name):
        assert torch.equal(fixed[name], also[name]) and not torch.equal(fixed[name], moved[name])


def test_routers_of_an_adapter_are_trained_too(parts, tmp_path):
    """peft trains a copy of every router; that copy is what is fitted, stepped and saved."""
    runs = {name: tmp_path / name for name in ("routers", "lora")}
    tiny_tuning.tune(parts, runs["routers"], num_train_epochs=0, **SETTINGS)
    tiny_tuning.tune(parts, runs["lora"], lora=True, lora_r=2, **SETTINGS)
    start, end = (load_file(run / "router.safetensors") for run in runs.values())
    assert start.keys() == end.keys()
    moved = [(end[name] - value).abs().max() for name, value in start.items() if "mod_router" in name]
    assert all(0 < change < 1 for change in moved)


def test_fp16_is_refused(parts, tmp_path):
    with pytest.raises(UserError, match="fp16"):
        command = tiny_tuning.command(parts, tmp_path / "run", **SETTINGS)
        command.training.fp16 = True
        from router_tuning.tuning.run import Run
        from router_tuning.tuning.tuning import run_tuning

        run_tuning(Run(command))
