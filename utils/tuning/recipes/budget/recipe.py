"""The ``budget`` recipe: routers that spend a requested capacity where it pays, and a dial for every other capacity.

Sequence level: inputs are run under many masks, forward only, and routers are fitted to the value of the masks
(:mod:`search`, :mod:`budget_policy`). Token level: the straight-through gradient trains the routers to keep the
dense model's predictions at many budgets (:mod:`training`), in coordinates that undo half of the correlation of
what they see (:mod:`whitening`). Both end in thresholds calibrated so that the requested share of the routed
work runs, and in a dial that reaches any other share without training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from router_tuning.errors import UserError
from router_tuning.model import routed_modules, set_thresholds
from router_tuning.model.dial import calibrate, capacity_at, logits_at, router_logits
from router_tuning.tuning.batching import Collator, StepOrder
from router_tuning.tuning.customized_trainer import RouterTrainer
from router_tuning.tuning.interruption import StopOnSignal
from router_tuning.tuning.job import TunedRun, TuningJob
from router_tuning.tuning.recipes.budget.policy import FitSettings, fit
from router_tuning.tuning.recipes.budget.search import Explored, explore
from router_tuning.tuning.recipes.budget.training import BudgetTrainer, current_settings
from router_tuning.tuning.recipes.budget.whitening import inverse_roots, whitened
from router_tuning.tuning.routing_statistics import CAPACITY, layer_key

SEARCH_INPUTS = 2048
MAX_MASKS = 64
FIT_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INITIAL_WEIGHT = 1e-3
"""Token level: deviation of the weights to start from. At zero every score ties, and the first step learns nothing."""
CALIBRATION_TOKENS = 12_000
_ROWS = 8
_CALIBRATION_ROWS = 64

Batch = dict[str, Tensor]


def tune(job: TuningJob) -> TunedRun:
    """Train the job's routers in place. Collective: every rank calls.

    Raises:
        UserError: for weights cut into shards, and at sequence level for anything but routers on a frozen base.
    """
    if any(hasattr(parameter, "ds_id") for parameter in job.model.parameters()):
        raise UserError("recipe 'budget' needs whole weights on every process: use ZeRO stage 2 or lower")
    return _search_and_fit(job) if is_sequence_level(job.model) else _train(job)


def measure(job: TuningJob, tuned: TunedRun) -> None:
    """Calibrate the dial and turn it to the requested capacity. Collective: every rank calls.

    Raises:
        ValueError: if the routers cannot tell inputs apart.
    """
    model = tuned.model
    training = model.training
    model.eval()
    batches = calibration_batches(job)
    dial = calibrate(model, batches, start=tuned.extra.get("dial"))
    logit = logits_at(dial, job.command.routing.target_capacity)
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


def _search_and_fit(job: TuningJob) -> TunedRun:
    if job.command.routing.trains != "routers":
        raise UserError(
            "recipe 'budget' at sequence level trains routers on a frozen base: leave out --lora, --router_only"
        )
    model = job.model
    rows = drawn_rows(job, SEARCH_INPUTS)
    batches = in_batches([job.data.rows[row] for row in rows], Collator(job.tokenizer), _ROWS)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(job.training.device)
    explored = explore(model, batches[rank::world], MAX_MASKS, seed=job.training.seed + rank)
    if world > 1:
        explored = _gathered(explored, world)
    policy = fit(explored, FIT_BUDGETS, FitSettings(seed=job.training.seed))
    install_policy(model, policy.weight)
    names = list(routed_modules(model))
    dial = {"capacity": policy.budgets, "logit": dict(zip(names, policy.logit.tolist(), strict=True))}
    trainer = RouterTrainer(**trainer_options(job), gradient_scale=job.command.routing.gradient_scale)
    history = [{"step": 0, "inputs": len(rows), "masks": explored.masks.shape[1]}]
    return TunedRun(trainer=trainer, history=history, extra={"dial": dial})


@torch.no_grad()
def install_policy(model, weight: Tensor) -> None:
    """Copy ``weight [R, d]`` into the routers, in the order in which they run."""
    for module, row in zip(routed_modules(model).values(), weight, strict=True):
        module.mod_router.weight.copy_(row[None].to(module.mod_router.weight.device))


def _gathered(explored: Explored, world: int) -> Explored:
    from router_tuning.tuning.recipes.budget.search import _joined

    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, explored)
    return _joined(parts)


# ---- token level


def _train(job: TuningJob) -> TunedRun:
    training, routing = job.training, job.command.routing
    if training.fp16:
        raise UserError("recipe 'budget' at token level reads gradients, which fp16 scales: use --bf16 or float32")
    generator = torch.Generator().manual_seed(training.seed)
    for weight in (module.mod_router.weight.data for module in routed_modules(job.model).values()):
        noise = torch.randn(weight.shape, generator=generator)
        if not weight.any():  # else a run that goes on from trained routers
            weight.copy_((INITIAL_WEIGHT * noise).to(weight.device))
    job.model.to(training.device)
    share = current_settings().whiten
    seen = inputs_of(_calibration_rows(job), Collator(job.tokenizer)) if share else []
    roots = inverse_roots(job.model, seen, share) if share else {}
    with whitened(job.model, roots) if share else nullcontext():
        trainer = BudgetTrainer(
            **trainer_options(job), price=routing.gradient_scale, distil=routing.trains == "routers"
        )
        trainer.train(resume_from_checkpoint=None if job.resume is None else str(job.resume))
    stopped = job.interruption.signal is not None
    return TunedRun(trainer=trainer, history=trainer.state.log_history, interrupted=stopped)


def trainer_options(job: TuningJob) -> dict[str, Any]:
    """What a trainer of any kind is made with."""
    training = job.training
    return {
        "model": job.model,
        "args": training,
        "train_dataset": job.data.rows,
        "data_collator": Collator(job.tokenizer),
        "callbacks": [StopOnSignal(job.interruption)],
        "target_capacity": job.command.routing.target_capacity,
        "order": StepOrder(
            job.data.lengths, training.global_batch_size, training.seed, job.command.data.length_grouping
        ),
        "settings": job.settings,
    }


# ---- data


def calibration_batches(job: TuningJob) -> list[Batch]:
    """What :func:`inputs_to_calibrate_on` makes of some of the training data."""
    return inputs_to_calibrate_on(_calibration_rows(job), Collator(job.tokenizer), is_sequence_level(job.model))


def is_sequence_level(model: nn.Module) -> bool:
    """Whether every router of a model decides per sequence, so that prompts are all it looks at."""
    return {module.mod_level for module in routed_modules(model).values()} == {"sequence"}


def _calibration_rows(job: TuningJob) -> list[dict[str, list[int]]]:
    wanted = CALIBRATION_TOKENS * (2 if is_sequence_level(job.model) else 1)
    return rows_until(job, reversed(drawn_rows(job, len(job.data.rows))), wanted)


def rows_until(job: TuningJob, order: Iterable[int], wanted: int) -> list[dict[str, list[int]]]:
    """Encoded rows in ``order`` until there are ``wanted`` tokens, or no more rows."""
    rows, tokens = [], 0
    for row in order:
        rows.append(job.data.rows[row])
        tokens += len(rows[-1]["input_ids"])
        if tokens >= wanted:
            break
    return rows


def inputs_to_calibrate_on(rows: Sequence[dict[str, list[int]]], collator: Collator, sequence: bool) -> list[Batch]:
    """Batches for :func:`~dial.calibrate` from encoded rows, right-padded: of each what generation runs.

    At sequence level a decision is taken on the prompt. At token level tokens run that predict a learnt one, and not
    those behind the last of these: counted, they made generation run 0.7 points less than asked for.
    """
    return inputs_of([prompt_of(row) if sequence else predicting_part_of(row) for row in rows], collator)


def inputs_of(rows: Sequence[dict[str, list[int]]], collator: Collator, size: int = _CALIBRATION_ROWS) -> list[Batch]:
    """Right-padded batches of ``size`` rows, of what a decoder takes."""
    batches = in_batches(rows, collator, size)
    return [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} for batch in batches]


def prompt_of(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tokens before the first that carries loss (at least one)."""
    length = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    length = max(1, length)
    return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}


def predicting_part_of(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """The tokens before the last one that carries loss (at least one)."""
    behind = next((i for i, label in enumerate(reversed(row["labels"]), 1) if label != -100), 0)
    length = max(1, len(row["labels"]) - behind)
    return {"input_ids": row["input_ids"][:length], "labels": row["labels"][:length]}


def in_batches(rows: Sequence[dict[str, list[int]]], collator: Collator, size: int) -> list[Batch]:
    """Right-padded batches of like lengths."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collator(ordered[start : start + size]) for start in range(0, len(ordered), size)]


def drawn_rows(job: TuningJob, count: int) -> list[int]:
    """So many rows of the training data, by number, drawn without replacement."""
    generator = torch.Generator().manual_seed(job.training.seed)
    return torch.randperm(len(job.data.rows), generator=generator)[:count].tolist()
