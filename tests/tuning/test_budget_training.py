"""Token level of ``--recipe budget``: thresholds give the drawn budget, the price finds the mean benefit, resuming."""

from __future__ import annotations

import shutil

import pytest
import tiny_tuning
import torch
from safetensors.torch import load_file
from tiny_models import random_batch, tiny_model

from router_tuning.errors import UserError
from router_tuning.model import record_routing, route, routed_modules
from router_tuning.tuning.recipes.budget.recipe import INITIAL_WEIGHT
from router_tuning.tuning.recipes.budget.training import Price, TrainSettings, share_threshold, training_with

SETTINGS = {"recipe": "budget", "granularity": "attn_token", "router_dir": None, "gradient_scale": 0.1}


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_a_share_of_the_logits_reaches_the_threshold(share):
    """Routers weigh alike however many rows or tokens each saw."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1000, generator=generator), torch.randn(4000, generator=generator) + 1]
    threshold = share_threshold(logits, share)
    reached = sum(float((part >= threshold).float().mean()) for part in logits) / 2
    assert reached == pytest.approx(share, abs=2e-3)


def test_price_becomes_the_mean_benefit_of_capacity():
    """A loss of ``-0.6`` per unit of mean capacity: from any start the price ends there, and the gradient is gone."""
    torch.manual_seed(0)
    model = route(tiny_model("llama", num_hidden_layers=5), mod_n=3, granularity="attn_token").train()
    routers = [module.mod_router for module in routed_modules(model).values()]
    for router in routers:
        torch.nn.init.normal_(router.weight, std=0.1)
    ids, mask = random_batch(rows=4, tokens=12)
    price = Price(2.0)
    for _ in range(40):
        model.zero_grad()
        with record_routing(model) as log:
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        price.watch(log)
        mean = torch.stack([record.capacity() for records in log.records.values() for record in records]).mean()
        (price.value * mean - 0.6 * mean).backward()
        price.on_step_end(None, None, None)
    assert float(price.value) == pytest.approx(0.6, abs=0.02)
    assert all(router.weight.grad.abs().max() < 1e-2 for router in routers)


def test_training_runs_at_the_drawn_budgets_and_resumes_with_the_same_bits(parts, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    tiny_tuning.tune(parts, whole, **SETTINGS)
    later = [line["capacity"] for line in tiny_tuning.history(whole)[1:]]
    # Thresholds come from a dense pass, the log from the routed one, and few tokens make a micro-batch.
    low, high = TrainSettings().budgets
    assert later and all(low - 0.05 <= capacity <= high + 0.1 for capacity in later)
    run.mkdir()
    shutil.copytree(whole / "checkpoint-4", run / "checkpoint-4")
    tiny_tuning.tune(parts, run, resume_from_checkpoint="auto", **SETTINGS)
    assert (run / "router.safetensors").read_bytes() == (whole / "router.safetensors").read_bytes()


def test_other_settings_hold_inside_their_block_alone(parts, tmp_path):
    """Budgets from 0.9 on: nearly everything runs; afterwards the recipe trains as before."""
    with training_with(TrainSettings(budgets=(0.9, 0.95))):
        tiny_tuning.tune(parts, tmp_path / "high", **SETTINGS)
    tiny_tuning.tune(parts, tmp_path / "usual", **SETTINGS)
    high, usual = (tiny_tuning.history(tmp_path / name)[1:] for name in ("high", "usual"))
    assert min(line["capacity"] for line in high) > 0.8 > max(line["capacity"] for line in usual)


@pytest.mark.parametrize(("even", "middle"), [(True, 0.41), (False, (0.02 * 0.8) ** 0.5)])
def test_budgets_are_drawn_evenly_or_on_a_logarithmic_scale(even, middle):
    torch.manual_seed(0)
    settings = TrainSettings(budgets=(0.02, 0.8), even=even)
    drawn = sorted(settings.draw() for _ in range(2000))
    assert 0.02 <= drawn[0] < drawn[-1] <= 0.8
    assert drawn[1000] == pytest.approx(middle, rel=0.1)


def test_routers_of_an_adapter_are_trained_too(parts, tmp_path):
    """peft trains a copy of every router; that copy is what whitening steps and what is saved."""
    run = tmp_path / "run"
    tiny_tuning.tune(parts, run, lora=True, lora_r=2, **SETTINGS)
    saved = load_file(run / "router.safetensors")
    assert saved and all(10 * INITIAL_WEIGHT < value.abs().max() < 10 for value in saved.values())


def test_fp16_is_refused(parts, tmp_path):
    with pytest.raises(UserError, match="fp16"):
        command = tiny_tuning.command(parts, tmp_path / "run", **SETTINGS)
        command.training.fp16 = True
        from router_tuning.tuning.interruption import Interruption
        from router_tuning.tuning.preparation import Preparation
        from router_tuning.tuning.tuning import run_tuning

        run_tuning(Preparation(command), Interruption())
