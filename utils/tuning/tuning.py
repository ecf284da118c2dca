"""A tuning run from checked arguments to result files: load, route, tune by a recipe, write."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from router_tuning.errors import UserError
from router_tuning.files import publish, write_json, write_text
from router_tuning.model import load_routers, route, save_routers
from router_tuning.provenance import provenance
from router_tuning.tuning import checkpoints
from router_tuning.tuning.batching import Collator, StepOrder
from router_tuning.tuning.calibration import drawn_rows, inputs_of
from router_tuning.tuning.engines import running
from router_tuning.tuning.interruption import Interruption
from router_tuning.tuning.job import TunedRun, TuningJob
from router_tuning.tuning.placement import CHOICE_TOKENS, PATH_TOKENS, choose, fit_paths
from router_tuning.tuning.preparation import Preparation
from router_tuning.tuning.recipes import load_recipe
from router_tuning.tuning.routing_statistics import CAPACITY
from router_tuning.tuning.run_folder import TEMPLATE, clear_folder, write_results
from router_tuning.tuning.tuning_data import TrainingData, tokenizer_hash
from router_tuning.tuning.tuning_model import identify, load_base, mark_trainable, routing_of

logger = logging.getLogger(__name__)
_TOLERANCE = 0.05  # a reached capacity further than this from its target is worth a warning


def run_tuning(preparation: Preparation, interruption: Interruption) -> TunedRun:
    """Tune and write the results. Collective: every rank calls.

    What was trained is saved before it is measured and calibrated.

    Raises:
        UserError: for a base that cannot be routed, a checkpoint of another run, data without assistant text, routers
            that cannot be calibrated.
    """
    command, output = preparation.command, preparation.output
    training = command.training
    settings = preparation.settings()
    agree_on(settings)
    resume = choose_checkpoint(training.resume_from_checkpoint, output, settings)
    if training.should_save:
        clear_folder(output, keep_checkpoints=training.resume_from_checkpoint is not None)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    with training.main_process_first(desc="encoding the data"):
        data = preparation.encode()
    transformers.set_seed(training.seed)
    model = load_base(preparation.base, command.model, preparation.config)
    try:
        explained = add_routing(model, preparation, data, resumed=resume is not None)
    except ValueError as error:
        raise UserError(str(error)) from None
    model = mark_trainable(model, command.routing)
    settings = preparation.settings()
    model.config.pad_token_id = preparation.tokenizer.pad_token_id
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
    job = TuningJob(preparation, model, data, settings, identify(model), interruption, resume, explained)
    describe(job)
    doubts = preparation.doubts(len(data.rows))
    for doubt in doubts:
        logger.warning(doubt)
    recipe = load_recipe(command.routing.recipe)
    tuned = recipe.tune(job)
    if tuned.interrupted:
        return tuned
    save_trained(job, tuned)
    try:
        recipe.measure(job, tuned)
    except ValueError as error:
        command_line = f"python entrypoints/analysis/calibrate.py --run {output} --data {data.raw.path}"
        raise UserError(f"{error}; the trained routers are saved: calibrate them with {command_line}") from None
    save_measured(job, tuned)
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


def add_routing(
    model: PreTrainedModel, preparation: Preparation, data: TrainingData, resumed: bool
) -> dict[str, float]:
    """Choose what is routed, route it, fit what skipped tokens get; what the fitted paths explain, by router.

    Where a run is resumed, or starts from saved routers, layers and paths are theirs. Every rank computes the same.
    """
    routing, training = preparation.command.routing, preparation.command.training
    collator = Collator(preparation.tokenizer)
    model.to(training.device)
    if routing.mod_layers == "auto":
        rows = drawn_rows(data, training.seed, CHOICE_TOKENS)
        choose(model, routing, inputs_of(rows, collator, size=4, tokens=1024), training.seed)
    config = routing_of(preparation.config, routing)
    route(model, **{name: value for name, value in vars(config).items() if value is not None})
    if routing.router_dir:
        load_routers(model, routing.router_dir)
    elif routing.skip != "zero" and not resumed:
        return fit_paths(model, inputs_of(drawn_rows(data, training.seed, PATH_TOKENS), collator))
    return {}


def describe(job: TuningJob) -> None:
    """Log what is about to happen, in a few lines."""
    command, data, training = job.command, job.data, job.training
    steps = StepOrder(data.lengths, training.global_batch_size, training.seed).steps
    total = sum(parameter.numel() for parameter in job.model.parameters())
    learnt = sum(parameter.numel() for parameter in job.model.parameters() if parameter.requires_grad)
    routing = job.model.config
    logger.info(
        f"{command.model.name}: {routing.mod_granularity} on layers {routing.mod_layers}; "
        f"{learnt:,} of {total:,} parameters train ({command.routing.trains})"
    )
    left = len(data.rows) - steps * training.global_batch_size
    logger.info(
        f"{data.raw.path}: {len(data.rows)} conversations in the {command.data.chat_template} chat template "
        f"(left out: {data.left_out or 0}; {data.cut} cut at {job.preparation.max_length} tokens); {steps} steps of "
        f"{training.global_batch_size} per epoch, {left} over"
    )
    if data.cut and job.preparation.max_length < command.data.max_seq_length:
        positions = job.preparation.max_length
        logger.warning(f"the base has {positions} positions: {data.cut} longer conversations were cut")
    logger.info(f"output folder: {job.output}")
    logger.info(
        f"{training.world_size} process(es) x {training.per_device_train_batch_size} sequences x "
        f"{training.gradient_accumulation_steps} accumulated, {command.model.dtype} weights on {training.device}"
    )


def save_trained(job: TuningJob, tuned: TunedRun) -> None:
    """Routers always; the adapter, or the whole model, where it trained; and the record. Collective."""
    tuned.weights = tuned.trainer.gather_trained()
    if job.training.should_save:
        model = tuned.model
        if isinstance(model, PeftModel):
            options = {"state_dict": tuned.weights, "save_embedding_layers": False}
            with publish(job.output / "adapter") as folder:
                model.save_pretrained(folder, **options)
        elif job.command.routing.trains == "full":
            with publish(job.output / "model") as folder:
                model.save_pretrained(folder, state_dict=tuned.weights)
                job.tokenizer.save_pretrained(folder)
        write_text(job.output / TEMPLATE, job.tokenizer.chat_template)
    save_measured(job, tuned)


def save_measured(job: TuningJob, tuned: TunedRun) -> None:
    """Routers with their thresholds and calibration, and the record with what was measured. Collective."""
    if job.training.should_save:
        routing = {name: value for name, value in tuned.weights.items() if "mod_router" in name or "mod_skip" in name}
        routers = {_router_name(name): value for name, value in routing.items()}
        save_routers(tuned.model, job.output, state=routers, extra={**tuned.extra, "base": job.base_fingerprint})
        if (config := job.output / "model" / "config.json").is_file():  # calibration has moved the thresholds
            threshold = {"mod_threshold": tuned.model.config.mod_threshold}
            write_json(config, json.loads(config.read_text(encoding="utf-8")) | threshold)
        write_results(job.output, record_of(job, tuned), tuned.history)
        reached, asked = tuned.measured.get(CAPACITY), job.command.routing
        if reached is not None and abs(reached - asked.target_capacity) > _TOLERANCE:
            logger.warning(missed_target(reached, asked.target_capacity, asked.recipe))
    tuned.trainer.barrier()


def record_of(job: TuningJob, tuned: TunedRun) -> dict[str, Any]:
    """What ``run.json`` says of a run; every path in it is absolute."""
    losses = [row for row in tuned.history if "loss" in row]
    return {
        "arguments": job.command.values(),
        **provenance(),
        "base": {"path": str(job.preparation.base.absolute()), "fingerprint": job.settings["base"]},
        "data": {
            "path": str(job.data.raw.path.absolute()),
            "rows": len(job.data.rows),
            "left_out": job.data.left_out,
            "sha256": job.data.raw.sha256,
        },
        "tokenizer": {
            "name": job.command.model.tokenizer_name,
            "chat_template": job.command.data.chat_template,
            "sha256": tokenizer_hash(job.tokenizer),
        },
        "seed": job.training.seed,
        "world_size": job.training.world_size,
        "engine": running(tuned.trainer.accelerator),
        "steps": tuned.trainer.state.global_step,
        "skip_explained": job.skip_explained,
        "target_capacity": job.command.routing.target_capacity,
        "reached_capacity": tuned.measured.get(CAPACITY),
        "capacity_by_router": {k: v for k, v in tuned.measured.items() if k.startswith(f"{CAPACITY}_layer")},
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def missed_target(reached: float, target: float, recipe: str) -> str:
    """What to tell a user whose routers run more or less than was asked for."""
    told = f"reached capacity {reached:.3f}, target {target:g}"
    if recipe == "paper":
        return f"{told}: recipe 'paper' does not hold a run to its target; --recipe budget (RECIPE=budget) does"
    return f"{told}: report the reached value; more data to calibrate on brings it closer (MAX_TRAIN_SAMPLES)"


def _router_name(name: str) -> str:
    """A router's name in a peft model → its name in a checkpoint of the routed model."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
