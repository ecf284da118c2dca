"""From a checked run to result files: load, route, tune by a recipe, save, measure."""

from __future__ import annotations

import logging
import os
import shlex
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import transformers
from accelerate.utils import gather_object
from peft import PeftModel

from router_tuning.errors import UserError
from router_tuning.files import exclusive, publish, write_text
from router_tuning.model import save_routers
from router_tuning.provenance import provenance
from router_tuning.tuning.recipes import RECIPES
from router_tuning.tuning.run import Run, TunedRun, steps_of
from router_tuning.tuning.run_folder import TEMPLATE, clear_folder, write_results
from router_tuning.tuning.trainer import checkpoints
from router_tuning.tuning.trainer.engine_state import gather_weights
from router_tuning.tuning.trainer.engines import running
from router_tuning.tuning.trainer.routing_statistics import CAPACITY
from router_tuning.tuning.tuning_data import tokenizer_hash

logger = logging.getLogger(__name__)
_FEW_STEPS = 10
_TOLERANCE = 0.05  # a reached capacity further than this from its target is worth a warning


def run_tuning(run: Run) -> TunedRun:
    """Tune and write the results. Collective: every rank calls.

    What was trained is saved before it is measured and calibrated.

    Raises:
        UserError: for a base that cannot be routed, a checkpoint of another run, data without assistant text, routers
            that cannot be calibrated, a folder in which another run is at work.
    """
    with exclusive(run.output) if run.training.should_save else nullcontext():
        return _tuned(run)


def _tuned(run: Run) -> TunedRun:
    training = run.training
    agree_on(run.settings | {"checkpoint": run.resume and run.resume.name})
    for note in run.notes:
        logger.warning(note)
    if run.resume is not None:
        logger.info(f"continuing from {run.resume.name}")
    if training.should_save:
        clear_folder(run.output, keep_checkpoints=training.resume_from_checkpoint is not None)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.output / "tensorboard")
    with training.main_process_first(desc="encoding the data"):
        run.encode()
    transformers.set_seed(training.seed)
    run.load()
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
    describe(run)
    recipe = import_module(RECIPES[run.routing.recipe])
    tuned = recipe.tune(run)
    if run.stop.signal:  # the checkpoint is there, results are not
        return tuned
    save_trained(run, tuned)
    try:
        recipe.measure(run, tuned)
    except ValueError as error:
        where = shlex.join(["--run", str(run.output), "--data", str(run.data.raw.path)])
        raise UserError(
            f"{error}; the trained routers are saved: calibrate them with "
            f"python entrypoints/analysis/calibrate.py {where}"
        ) from None
    save_measured(run, tuned)
    return tuned


def agree_on(settings: dict[str, Any]) -> None:
    """UserError if processes were started with different settings, or do not see the same checkpoint."""
    everyone = gather_object([settings])
    for rank, other in enumerate(everyone):
        if differing := checkpoints.differences(everyone[0], other):
            raise UserError(
                f"process {rank} was started with other settings than process 0: {differing}; give every machine the "
                "same settings, base and data, and one output folder"
            )


def describe(run: Run) -> None:
    """Log what is about to happen, in a few lines."""
    command, data, training, routing = run.command, run.data, run.training, run.model.config
    learnt = [parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad]
    logger.info(
        f"{command.model.name}: {routing.mod_granularity} on layers {routing.mod_layers}; "
        f"{sum(learnt):,} of {run.model.num_parameters():,} parameters train ({command.routing.trained_parts})"
    )
    template = "published" if command.data.chat_template == "published" else "base's own"
    logger.info(
        f"{data.raw.path}: {len(data.rows)} conversations in the {template} chat template "
        f"(left out: {data.left_out or 0}; {data.cut} cut at {run.max_length} tokens)"
    )
    if data.cut and run.max_length < command.data.max_seq_length:
        logger.warning(f"the base has {run.max_length} positions: {data.cut} longer conversations were cut")
    logger.info(
        f"{training.world_size} process(es) x {training.per_device_train_batch_size} sequences x "
        f"{training.gradient_accumulation_steps} accumulated, {command.model.dtype} weights on {training.device}; "
        f"output folder: {run.output}"
    )
    steps = steps_of(training, len(data.rows))
    if 0 < steps < _FEW_STEPS:
        logger.warning(
            f"{steps} steps are few to learn anything in: more rows (MAX_TRAIN_SAMPLES), more epochs (NUM_EPOCHS) "
            "or a smaller GLOBAL_BATCH_SIZE give more"
        )


# ---- what a run leaves


def save_trained(run: Run, tuned: TunedRun) -> None:
    """Routers always; the adapter, or the whole model, where it trained; and the record. Collective."""
    tuned.weights = gather_weights(tuned.trainer.model)
    if run.training.should_save:
        model = tuned.model
        if isinstance(model, PeftModel):
            options = {"state_dict": tuned.weights, "save_embedding_layers": False}
            with publish(run.output / "adapter") as folder:
                model.save_pretrained(folder, **options)
        elif run.routing.trains == "full":
            with publish(run.output / "model") as folder:
                model.save_pretrained(folder, state_dict=tuned.weights)
                run.tokenizer.save_pretrained(folder)
        write_text(run.output / TEMPLATE, run.tokenizer.chat_template)
    save_measured(run, tuned)


def save_measured(run: Run, tuned: TunedRun) -> None:
    """Routers with their thresholds and calibration, and the record with what was measured. Collective."""
    if run.training.should_save:
        routing = {name: value for name, value in tuned.weights.items() if "mod_router" in name or "mod_skip" in name}
        routers = {_router_name(name): value for name, value in routing.items()}
        save_routers(tuned.model, run.output, state=routers, extra={**tuned.extra, "base": run.base_fingerprint})
        log = [row for row in tuned.trainer.state.log_history if "loss" in row]
        write_results(run.output, record_of(run, tuned), log)
        reached, asked = tuned.measured.get(CAPACITY), run.routing
        if reached is not None and abs(reached - asked.target_capacity) > _TOLERANCE:
            logger.warning(missed_target(reached, asked.target_capacity, asked.recipe))
        elif reached is not None:
            logger.info(f"reached: {reached:.3f} of the routed work runs, {asked.target_capacity:g} was asked for")
    tuned.trainer.accelerator.wait_for_everyone()


def record_of(run: Run, tuned: TunedRun) -> dict[str, Any]:
    """What ``run.json`` says of a run; every path in it is absolute."""
    return {
        "arguments": run.command.values(),
        **provenance(),
        "base": {"path": str(run.base.absolute()), "fingerprint": run.settings["base"]},
        "data": {
            "path": str(run.data.raw.path.absolute()),
            "rows": len(run.data.rows),
            "left_out": run.data.left_out,
            "sha256": run.data.raw.sha256,
        },
        "tokenizer": {
            "name": run.command.model.tokenizer_name,
            "chat_template": run.command.data.chat_template,
            "sha256": tokenizer_hash(run.tokenizer),
        },
        "seed": run.training.seed,
        "world_size": run.training.world_size,
        "engine": running(tuned.trainer.accelerator),
        "steps": tuned.trainer.state.global_step,
        "skip_explained": run.skip_explained,
        "target_capacity": run.routing.target_capacity,
        "reached_capacity": tuned.measured.get(CAPACITY),
        "capacity_by_router": {k: v for k, v in tuned.measured.items() if k.startswith(f"{CAPACITY}_layer")},
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
