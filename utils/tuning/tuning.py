"""From a checked run to result files: load, route, tune by a recipe, save, measure."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers

from router_tuning.errors import UserError
from router_tuning.tuning import checkpoints
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.recipes import load_recipe
from router_tuning.tuning.results import save_measured, save_trained
from router_tuning.tuning.run import Run, TunedRun
from router_tuning.tuning.run_folder import clear_folder

logger = logging.getLogger(__name__)


def run_tuning(run: Run) -> TunedRun:
    """Tune and write the results. Collective: every rank calls.

    What was trained is saved before it is measured and calibrated.

    Raises:
        UserError: for a base that cannot be routed, a checkpoint of another run, data without assistant text, routers
            that cannot be calibrated.
    """
    training = run.training
    agree_on(run.settings)
    resume = choose_checkpoint(training.resume_from_checkpoint, run.output, run.settings)
    if training.should_save:
        clear_folder(run.output, keep_checkpoints=training.resume_from_checkpoint is not None)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.output / "tensorboard")
    with training.main_process_first(desc="encoding the data"):
        run.encode()
    transformers.set_seed(training.seed)
    run.load(resume)
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
    describe(run)
    doubts = run.doubts(len(run.data.rows))
    for doubt in doubts:
        logger.warning(doubt)
    recipe = load_recipe(run.routing.recipe)
    tuned = recipe.tune(run)
    if tuned.interrupted:
        return tuned
    save_trained(run, tuned)
    try:
        recipe.measure(run, tuned)
    except ValueError as error:
        command = f"python entrypoints/analysis/calibrate.py --run {run.output} --data {run.data.raw.path}"
        raise UserError(f"{error}; the trained routers are saved: calibrate them with {command}") from None
    save_measured(run, tuned)
    for doubt in doubts:
        logger.warning(doubt)
    return tuned


def agree_on(settings: dict[str, Any]) -> None:
    """UserError if processes were started with different settings."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, settings)
    for rank, other in enumerate(everyone):
        if differing := checkpoints.differences(everyone[0], other):
            raise UserError(
                f"process {rank} was started with other settings than process 0: {differing}; give every machine the "
                "same settings, base and data"
            )


def choose_checkpoint(resume: str | None, output: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to continue, the same on every rank; UserError if it belongs to another run."""
    folder, notes = checkpoints.chosen(resume, output)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        choice = [None if folder is None else str(folder)]
        dist.broadcast_object_list(choice, src=0)
        if choice[0] is not None and not Path(choice[0], checkpoints.MANIFEST).is_file():
            raise UserError(
                f"process {dist.get_rank()} does not see {choice[0]}: put the output on a shared file system"
            )
        folder = None if choice[0] is None else Path(choice[0])
    for note in notes:
        logger.warning(note)
    if folder is not None:
        checkpoints.check_settings(folder, settings)
        logger.info(f"continuing from {folder.name}")
    return folder


def describe(run: Run) -> None:
    """Log what is about to happen, in a few lines."""
    command, data, training = run.command, run.data, run.training
    steps = StepOrder(data.lengths, training.global_batch_size, training.seed).steps
    total = sum(parameter.numel() for parameter in run.model.parameters())
    learnt = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    routing = run.model.config
    logger.info(
        f"{command.model.name}: {routing.mod_granularity} on layers {routing.mod_layers}; "
        f"{learnt:,} of {total:,} parameters train ({command.routing.trains})"
    )
    left = len(data.rows) - steps * training.global_batch_size
    logger.info(
        f"{data.raw.path}: {len(data.rows)} conversations in the {command.data.chat_template} chat template "
        f"(left out: {data.left_out or 0}; {data.cut} cut at {run.max_length} tokens); {steps} steps of "
        f"{training.global_batch_size} per epoch, {left} over"
    )
    if data.cut and run.max_length < command.data.max_seq_length:
        logger.warning(f"the base has {run.max_length} positions: {data.cut} longer conversations were cut")
    logger.info(f"output folder: {run.output}")
    logger.info(
        f"{training.world_size} process(es) x {training.per_device_train_batch_size} sequences x "
        f"{training.gradient_accumulation_steps} accumulated, {command.model.dtype} weights on {training.device}"
    )
