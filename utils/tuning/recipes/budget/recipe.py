"""The ``budget`` recipe: routers that spend a requested capacity where it pays, and a dial for every other capacity.

Routers start in closed form (:mod:`closed_form`), and regression under their own policy trains them at many budgets
(:mod:`regression`); with ``num_train_epochs 0`` closed form is all. What follows are thresholds calibrated so that the
requested share of the routed work runs, and a dial that reaches any other share without training.
"""

from __future__ import annotations

import logging

import torch

from router_tuning.errors import UserError
from router_tuning.model import routed_modules, set_thresholds
from router_tuning.model.dial import calibrate, router_logits, shares_at
from router_tuning.model.saving import thresholds_for
from router_tuning.tuning.batching import in_batches, inputs_to_calibrate_on, is_sequence_level
from router_tuning.tuning.recipes.budget.closed_form import RIDGES, Start, fit_routers, within_limits
from router_tuning.tuning.recipes.budget.gates import inputs_seen, router_of
from router_tuning.tuning.recipes.budget.regression import RegressionTrainer
from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.trainer.customized_trainer import RouterTrainer
from router_tuning.tuning.trainer.routing_statistics import CAPACITY, layer_key

logger = logging.getLogger(__name__)
_ROWS = 8
_LABELLED_AT_ONCE = 1024
"""Tokens of a batch whose damages are read: its logits, and their gradient, are in memory."""
_SEQUENCES = 4
"""Times as many tokens are labelled where whole sequences are decided on."""


def tune(run: Run) -> TunedRun:
    """Train the run's routers, and what else trains, in place. Collective: every rank calls.

    Raises:
        UserError: for settings under which engines would have nothing to step.
    """
    training = run.training
    run.model.to(training.device)
    start = _start(run)
    if run.steps:
        trainer, end = _trained(run, start)
    else:
        trainer, end = RouterTrainer(**run.trainer_options, gradient_scale=0), start.logit
    dial = {"capacity": [0.5], "logit": {name: [value] for name, value in within_limits(run.model, end).items()}}
    return TunedRun(trainer, extra={"dial": dial, "damage": start.damage})


def measure(run: Run, tuned: TunedRun) -> None:
    """Calibrate the dial and turn it to the requested capacity. Collective: every rank calls.

    Raises:
        ValueError: if the routers cannot tell inputs apart.
    """
    model = tuned.model
    training = model.training
    model.eval()
    sequence = is_sequence_level(model)
    rows = run.rows(run.command.budget.calibration_tokens * (2 if sequence else 1), other=True)
    batches = inputs_to_calibrate_on(rows, run.collator, sequence)
    logger.info(f"calibrating the dial on {_tokens(rows):,} tokens")
    tuned.extra["dial"] = dial = calibrate(model, batches, start=tuned.extra["dial"])
    set_thresholds(model, thresholds_for({"dial": dial}, run.routing.target_capacity, run.output))
    modules = routed_modules(model)
    shares = shares_at(router_logits(model, batches), {name: module.mod_logit for name, module in modules.items()})
    tuned.measured = {CAPACITY: sum(shares.values()) / len(shares)}
    tuned.measured |= {layer_key(modules[name].mod_key): share for name, share in shares.items()}
    model.train(training)


def _start(run: Run) -> Start:
    """Routers to start from, in place: closed form, or saved ones, of which no damage is known."""
    if run.routing.router_dir or run.resume:
        modules = routed_modules(run.model)
        logit = {name: min(max(module.mod_logit, -30.0), 30.0) for name, module in modules.items()}
        return Start(logit, {}, RIDGES[0])
    rows = _label_rows(run)
    logger.info(f"fitting routers to start from on {_tokens(rows):,} tokens")
    batches = in_batches(rows, run.collator, _ROWS, _LABELLED_AT_ONCE)
    generator = torch.Generator().manual_seed(run.training.seed)
    order = torch.randperm(len(batches), generator=generator).tolist()  # rows of all lengths among those held out
    return fit_routers(run.model, [batches[index] for index in order], run.training.seed)


def _trained(run: Run, start: Start) -> tuple[RouterTrainer, dict[str, float]]:
    """Routers take steps of their own; the optimizer has skip paths, adapters or the base."""
    model = run.model
    for module in routed_modules(model).values():
        router_of(module).weight.requires_grad_(False)
    if run.training.world_size > 1 and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("recipe 'budget' on several processes trains paths, too: --skip low_rank --train_skip true")
    bias = {name: -logit for name, logit in start.logit.items()}
    batches = inputs_to_calibrate_on(_label_rows(run), run.collator, is_sequence_level(model))
    inputs, scores = inputs_seen(model, batches, bias)
    trainer = RegressionTrainer(
        **run.trainer_options,
        recipe=run.command.budget,
        distil=run.routing.trains == "routers",
        inputs=inputs,
        start=start,
        scores=scores,
    )
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    return trainer, {name: -bias for name, bias in trainer.policy.bias.items()}


def _tokens(rows: list[dict[str, list[int]]]) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def _label_rows(run: Run) -> list[dict[str, list[int]]]:
    return run.rows(run.command.budget.label_tokens * (_SEQUENCES if is_sequence_level(run.model) else 1))
