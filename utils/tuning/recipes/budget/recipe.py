"""The ``budget`` recipe: routers that spend a requested capacity where it pays, and a dial for every other capacity.

Sequence level: inputs are run under many masks, forward only, and routers are fitted to the value of the masks
(:mod:`search`, :mod:`policy`). Token level: routers start in closed form (:mod:`closed_form`), and the gradient trains
them to keep the dense model's predictions at many budgets (:mod:`training`); with ``num_train_epochs 0`` closed form
is all. Both end in thresholds calibrated so that the requested share of the routed work runs, and in a dial that
reaches any other share without training.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from router_tuning.errors import UserError
from router_tuning.model import routed_modules, set_thresholds
from router_tuning.model.dial import calibrate, capacity_at, logits_at, router_logits
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.calibration import (
    drawn_rows,
    in_batches,
    inputs_of,
    inputs_to_calibrate_on,
    is_sequence_level,
)
from router_tuning.tuning.customized_trainer import RouterTrainer
from router_tuning.tuning.engine_state import full_tensor
from router_tuning.tuning.interruption import StopOnSignal
from router_tuning.tuning.recipes.budget.closed_form import fit_routers, within_limits
from router_tuning.tuning.recipes.budget.gates import inputs_seen
from router_tuning.tuning.recipes.budget.policy import FitSettings, fit
from router_tuning.tuning.recipes.budget.regression import RegressionTrainer
from router_tuning.tuning.recipes.budget.search import Explored, explore, joined
from router_tuning.tuning.recipes.budget.settings import BudgetArguments
from router_tuning.tuning.recipes.budget.thresholds import biased, routers_that_train
from router_tuning.tuning.recipes.budget.training import BudgetTrainer, input_norms
from router_tuning.tuning.routing_statistics import CAPACITY, layer_key
from router_tuning.tuning.run import Run, TunedRun

FIT_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INITIAL_WEIGHT = 1e-3
"""Deviation of the weights of experts' routers to start from."""
_ROWS = 8
_LABELLED_AT_ONCE = 1024
"""Tokens of a batch whose damages are read: its logits, and their gradient, are in memory."""
_NORM_TOKENS = 1000


def tune(run: Run) -> TunedRun:
    """Train the run's routers in place. Collective: every rank calls.

    Raises:
        UserError: at sequence level, for anything but routers on a frozen base.
    """
    return _search_and_fit(run) if is_sequence_level(run.model) else _train(run)


def measure(run: Run, tuned: TunedRun) -> None:
    """Calibrate the dial and turn it to the requested capacity. Collective: every rank calls.

    Raises:
        ValueError: if the routers cannot tell inputs apart.
    """
    model = tuned.model
    training = model.training
    model.eval()
    batches = inputs_to_calibrate_on(_calibration_rows(run), run.collator, is_sequence_level(model))
    dial = calibrate(model, batches, start=tuned.extra.get("dial"))
    logit = logits_at(dial, run.routing.target_capacity)
    set_thresholds(
        model, {name: float(torch.sigmoid(torch.tensor(z, dtype=torch.double))) for name, z in logit.items()}
    )
    logits = router_logits(model, batches)
    keys = {name: module.mod_key for name, module in routed_modules(model).items()}
    shares = {name: float((values >= logit[name]).float().mean()) for name, values in logits.items()}
    tuned.measured = {
        CAPACITY: capacity_at(logits, logit),
        **{layer_key(keys[name]): share for name, share in shares.items()},
    }
    tuned.extra["dial"] = dial
    model.train(training)


# ---- sequence level


def _search_and_fit(run: Run) -> TunedRun:
    if run.routing.trains != "routers":
        raise UserError(
            "recipe 'budget' at sequence level trains routers on a frozen base: leave out --lora, --router_only"
        )
    model = run.model
    generator = torch.Generator().manual_seed(run.training.seed)
    rows = torch.randperm(len(run.data.rows), generator=generator)[: run.command.budget.search_inputs].tolist()
    batches = in_batches([run.data.rows[row] for row in rows], run.collator, _ROWS)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(run.training.device)
    explored = explore(model, batches[rank::world], run.command.budget.search_masks, seed=run.training.seed + rank)
    if world > 1:
        explored = _gathered(explored, world)
    policy = fit(explored, FIT_BUDGETS, FitSettings(seed=run.training.seed))
    install_policy(model, policy.weight)
    names = list(routed_modules(model))
    dial = {"capacity": policy.budgets, "logit": dict(zip(names, policy.logit.tolist(), strict=True))}
    trainer = RouterTrainer(**trainer_options(run), gradient_scale=run.routing.gradient_scale)
    history = [{"step": 0, "inputs": len(rows), "masks": explored.masks.shape[1]}]
    return TunedRun(trainer=trainer, history=history, extra={"dial": dial})


@torch.no_grad()
def install_policy(model, weight: Tensor) -> None:
    """Copy ``weight [R, d]`` into the routers, in the order in which they run."""
    for module, row in zip(routed_modules(model).values(), weight, strict=True):
        module.mod_router.weight.copy_(row[None].to(module.mod_router.weight.device))


def _gathered(explored: Explored, world: int) -> Explored:
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, explored)
    return joined(parts)


# ---- token level


def _train(run: Run) -> TunedRun:
    training = run.training
    if training.fp16 or training.activation_checkpointing:
        raise UserError("recipe 'budget' at token level reads gradients: leave out fp16 and activation checkpointing")
    model, parts = run.model.to(training.device), run.routing.config().parts
    start, damages = _start(run)
    train = _by_regression if run.routing.trains == "routers" and "expert" not in parts else _straight_through
    trainer, end = train(run, start) if run.steps else (RouterTrainer(**trainer_options(run), gradient_scale=0), start)
    stopped = run.interruption.signal is not None
    logit = dict.fromkeys(routed_modules(model), 0.0) | (within_limits(model, end) if end else {})
    dial = {"capacity": [0.5], "logit": {name: [value] for name, value in logit.items()}}
    return TunedRun(trainer, trainer.state.log_history, interrupted=stopped, extra={"dial": dial, "damage": damages})


def _by_regression(run: Run, start: dict[str, float]) -> tuple[RouterTrainer, dict[str, float]]:
    """Routers of a frozen base. The optimizer has skip paths alone, routers take steps of their own."""
    for module in routed_modules(run.model).values():
        module.mod_router.weight.requires_grad_(False)
    if run.training.world_size > 1 and not any(parameter.requires_grad for parameter in run.model.parameters()):
        raise UserError("recipe 'budget' on several processes trains paths, too: --skip low_rank --train_skip true")
    bias = {name: -logit for name, logit in start.items()}
    batches = inputs_to_calibrate_on(run.rows(run.command.budget.label_tokens), run.collator, sequence=False)
    inputs, scores = inputs_seen(run.model, batches, bias)
    trainer = RegressionTrainer(
        **trainer_options(run),
        recipe=_budgets(run),
        saved=saved_shares(run.model),
        inputs=inputs,
        bias=bias,
        scores=scores,
    )
    trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
    return trainer, {name: -bias for name, bias in trainer.policy.bias.items()}


def _straight_through(run: Run, start: dict[str, float]) -> tuple[RouterTrainer, dict[str, float]]:
    """Routers of single experts, or beside adapters or a base that trains."""
    model, saved = run.model, saved_shares(run.model)
    with biased(model, {name: -logit for name, logit in start.items()}):
        trainer = BudgetTrainer(
            **trainer_options(run),
            recipe=_budgets(run),
            weights={name: share / sum(saved.values()) for name, share in saved.items()},
            multiplier=run.routing.gradient_scale,
            distil=run.routing.trains == "routers",
            norms=input_norms(model, inputs_of(run.rows(_NORM_TOKENS), run.collator)),
        )
        trainer.train(resume_from_checkpoint=None if run.resume is None else str(run.resume))
        end = {n: -float(full_tensor(router.bias)) for n, router in routers_that_train(model).items() if n in start}
    return trainer, end


def _budgets(run: Run) -> BudgetArguments:
    """The recipe's settings with the lowest budget that this run trains at."""
    budget, saved = run.command.budget, sum(saved_shares(run.model).values())
    return replace(budget, lowest_budget=budget.lowest(run.routing.target_capacity, saved))


def _start(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Routers to start from, in place: closed form, saved ones, or for single experts noise, since ties teach nothing.

    Returns:
        Threshold logits by router and, of closed form, the damage of skipping each module.
    """
    modules = {name: m for name, m in routed_modules(run.model).items() if m.mod_part != "expert"}
    if run.routing.router_dir or run.resume:
        return {name: _finite(module.mod_logit) for name, module in modules.items()}, {}
    generator = torch.Generator().manual_seed(run.training.seed)
    for name, module in routed_modules(run.model).items():
        if name not in modules:
            weight = module.mod_router.weight.data
            weight.copy_(INITIAL_WEIGHT * torch.randn(weight.shape, generator=generator))
    if not modules:
        return {}, {}
    batches = in_batches(run.rows(run.command.budget.label_tokens), run.collator, _ROWS, _LABELLED_AT_ONCE)
    order = torch.randperm(len(batches), generator=generator).tolist()  # rows of all lengths among those held out
    return fit_routers(run.model, [batches[index] for index in order], list(modules), run.training.seed)


def _finite(logit: float) -> float:
    return min(max(logit, -30.0), 30.0)


def trainer_options(run: Run) -> dict[str, Any]:
    """What a trainer of any kind is made with."""
    training = run.training
    return {
        "model": run.model,
        "args": training,
        "train_dataset": run.data.rows,
        "data_collator": run.collator,
        "callbacks": [StopOnSignal(run.interruption)],
        "target_capacity": run.routing.target_capacity,
        "order": StepOrder(
            run.data.lengths, training.global_batch_size, training.seed, run.command.data.length_grouping
        ),
        "settings": run.settings,
    }


def _calibration_rows(run: Run) -> list[dict[str, list[int]]]:
    wanted = run.command.budget.calibration_tokens * (2 if is_sequence_level(run.model) else 1)
    return drawn_rows(run.data, run.training.seed, wanted, other=True)
