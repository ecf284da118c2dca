"""A tuning run from checked arguments to result files: load, route, tune by a recipe, write."""

from __future__ import annotations

import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.model import save_routers
from router_tuning.provenance import provenance
from router_tuning.tuning import checkpoints
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.encoding import load_tokenizer, template_kind
from router_tuning.tuning.engines import running
from router_tuning.tuning.interruption import Interruption
from router_tuning.tuning.job import TunedRun, TuningJob
from router_tuning.tuning.recipes import load_recipe
from router_tuning.tuning.routing_statistics import CAPACITY
from router_tuning.tuning.run_folder import (
    TEMPLATE,
    check_folder,
    clear_folder,
    default_folder,
    write_results,
)
from router_tuning.tuning.tuning_data import RawData, TrainingData, check_file, encode_file, tokenizer_hash
from router_tuning.tuning.tuning_model import (
    dense_config,
    fingerprint,
    identify,
    load_model,
    locate_base,
    routing_of,
)

logger = logging.getLogger(__name__)
_TOLERANCE = 0.05  # a reached capacity further than this from its target is worth a warning


class Preparation:
    """Everything about a run that can be checked before weights are loaded.

    Raises:
        UserError: in the constructor, one line for what is wrong with base, routing, data or output folder.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.base = locate_base(command.model)
        self.config = dense_config(self.base, command.model)
        routing_of(self.config, command.routing)
        training = command.training
        if training.output_dir in (None, "trainer_output"):
            training.output_dir = str(default_folder(command))
        self.output = Path(training.output_dir)
        check_folder(self.output, training.resume_from_checkpoint is not None, training.overwrite_output_dir)
        self.tokenizer = load_tokenizer(
            command.model.tokenizer_name or self.base, command.data.chat_template, command.model.trust_remote_code
        )
        self.tokenizer.padding_side = "right"
        command.data.chat_template = template_kind(self.tokenizer)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(command.data.max_seq_length, positions or command.data.max_seq_length)
        self.raw: RawData = check_file(command.data.path, command.data.max_train_samples)
        StepOrder([0] * self.raw.rows, training.global_batch_size, training.seed)

    def check_checkpoint(self) -> None:
        """UserError if the checkpoint to continue belongs to another run, as far as one process can tell."""
        folder, _ = checkpoints.chosen(self.command.training.resume_from_checkpoint, self.output)
        if folder is not None:
            identity = self.identity()
            del identity["deepspeed"]  # known to the launched processes
            checkpoints.check_identity(folder, identity)

    def identity(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to continue it to the same result."""
        routing, training = self.command.routing, self.command.training
        settings = {
            "base": fingerprint(self.base),
            "data": f"{self.raw.rows} rows, sha256 {self.raw.sha256[:16]}",
            "dtype": self.command.model.dtype,
            "recipe": routing.recipe,
            "trains": routing.trains,
        }
        for name in ("granularity", "threshold", "router_pooling", "kv_policy", "target_capacity", "gradient_scale"):
            settings[name] = getattr(routing, name)
        settings["mod_n"], settings["mod_layers"] = routing.mod_n, routing.mod_layers
        if routing.lora:
            settings["lora"] = [routing.lora_r, routing.lora_alpha, routing.lora_dropout, routing.lora_target_modules]
        names = ("global_batch_size", "per_device_train_batch_size", "learning_rate", "weight_decay", "warmup_steps")
        for name in (*names, "num_train_epochs", "max_steps", "max_grad_norm", "seed"):
            settings[name] = getattr(training, name)
        settings["lr_scheduler_type"], settings["optim"] = training.lr_scheduler_type.value, training.optim.value
        settings["max_seq_length"] = self.command.data.max_seq_length
        settings["length_grouping"] = self.command.data.length_grouping
        settings["chat_template"] = self.command.data.chat_template
        settings["tokenizer"] = tokenizer_hash(self.tokenizer)[:16]
        plugin = training.deepspeed_plugin
        settings["deepspeed"] = plugin and f"ZeRO-{plugin.zero_stage} on {training.world_size} processes"
        return settings


def run_tuning(preparation: Preparation, interruption: Interruption) -> TunedRun:
    """Tune and write the results. Collective: every rank calls.

    Raises:
        UserError: for a base that cannot be routed, a checkpoint of another run, data without assistant text.
    """
    command, output = preparation.command, preparation.output
    training = command.training
    identity = preparation.identity()
    agree_on(identity)
    resume = choose_checkpoint(training.resume_from_checkpoint, output, identity)
    if training.should_save:
        clear_folder(output, keep_checkpoints=training.resume_from_checkpoint is not None)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / "tensorboard")
    tokenizer, processes = preparation.tokenizer, command.data.preprocessing_num_workers
    with training.main_process_first(desc="encoding the data"):
        data = encode_file(preparation.raw, tokenizer, preparation.max_length, processes)
    check_ids(tokenizer, data, preparation.config)
    transformers.set_seed(training.seed)
    model = load_model(preparation.base, command.model, command.routing, preparation.config)
    model.config.pad_token_id = tokenizer.pad_token_id
    if training.activation_checkpointing:
        training.activation_checkpointing_kwargs = {"use_reentrant": False}
    job = TuningJob(
        command, model, tokenizer, data, preparation.max_length, identity, identify(model), interruption, resume
    )
    describe(job)
    tuned = load_recipe(command.routing.recipe).tune(job)
    if not tuned.interrupted:
        finish(job, tuned)
    return tuned


def check_ids(tokenizer: PreTrainedTokenizerBase, data: TrainingData, config: PretrainedConfig) -> None:
    """UserError for rows, or padding, with ids that the base's embedding has not."""
    largest, size = max(data.largest_id, tokenizer.pad_token_id), config.get_text_config().vocab_size
    if largest >= size:
        raise UserError(
            f"--tokenizer_name {tokenizer.name_or_path}: its ids reach {largest} in the data, the base's embedding "
            f"has vocab_size {size}: this tokenizer belongs to another base"
        )


def agree_on(identity: dict[str, Any]) -> None:
    """UserError if processes were started with different settings."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, identity)
    for rank, other in enumerate(everyone):
        for name, value in everyone[0].items():
            if other.get(name) != value:
                raise UserError(
                    f"process {rank} was started with {name} {other.get(name)!r}, process 0 with {value!r}: "
                    "give every machine the same settings, base and data"
                )


def choose_checkpoint(resume: str | None, output: Path, identity: dict[str, Any]) -> Path | None:
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
        checkpoints.check_identity(folder, identity)
        logger.info(f"continuing from {folder.name}")
    return folder


def describe(job: TuningJob) -> None:
    """Log what is about to happen, in a few lines."""
    command, data, training = job.command, job.data, job.command.training
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
        f"(left out: {data.left_out or 0}; {data.cut} cut at {job.max_length} tokens); {steps} steps of "
        f"{training.global_batch_size} per epoch, {left} over"
    )
    if data.cut and job.max_length < command.data.max_seq_length:
        logger.warning(f"{data.cut} conversations are longer than the {job.max_length} positions of the base: cut")
    logger.info(f"output folder: {job.output}")
    logger.info(
        f"{training.world_size} process(es) x {training.per_device_train_batch_size} sequences x "
        f"{training.gradient_accumulation_steps} accumulated, {command.model.dtype} weights on {training.device}"
    )


def finish(job: TuningJob, tuned: TunedRun) -> None:
    """Write routers, adapter or model, and the record of the run. Collective: every rank calls."""
    training, routing, output = job.command.training, job.command.routing, job.output
    weights = tuned.trainer.gather_trained()
    if training.should_save:
        write_trained(job, tuned, weights)
        losses = [row for row in tuned.history if "loss" in row]
        reached = tuned.measured.get(CAPACITY)
        record = {
            "arguments": job.command.values(),
            **provenance(),
            "base": {"path": str(Path(job.command.model.base)), "fingerprint": job.identity["base"]},
            "data": {
                "path": str(job.data.raw.path),
                "rows": len(job.data.rows),
                "left_out": job.data.left_out,
                "sha256": job.data.raw.sha256,
            },
            "tokenizer": {
                "name": job.command.model.tokenizer_name,
                "chat_template": job.command.data.chat_template,
                "sha256": tokenizer_hash(job.tokenizer),
            },
            "seed": training.seed,
            "world_size": training.world_size,
            "engine": running(tuned.trainer.accelerator),
            "steps": tuned.trainer.state.global_step,
            "target_capacity": routing.target_capacity,
            "reached_capacity": reached,
            "capacity_by_router": {k: v for k, v in tuned.measured.items() if k.startswith(f"{CAPACITY}_layer")},
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        }
        write_results(output, record, tuned.history)
        if reached is not None and abs(reached - routing.target_capacity) > _TOLERANCE:
            logger.warning(missed_target(reached, routing.target_capacity, routing.recipe))
    tuned.trainer.barrier()


def missed_target(reached: float, target: float, recipe: str) -> str:
    """What to tell a user whose routers run more or less than was asked for."""
    told = f"reached capacity {reached:.3f}, target {target:g}"
    if recipe == "paper":
        return f"{told}: recipe 'paper' does not hold a run to its target; --recipe budget (RECIPE=budget) does"
    return f"{told}: report the reached value; more data to calibrate on brings it closer (MAX_TRAIN_SAMPLES)"


def write_trained(job: TuningJob, tuned: TunedRun, weights: dict[str, torch.Tensor]) -> None:
    """Routers always; the adapter, or the whole model, where it trained."""
    model = tuned.trainer.accelerator.unwrap_model(tuned.trainer.model, keep_fp32_wrapper=False)
    routers = {
        _router_name(name): value for name, value in weights.items() if "mod_router" in name or "mod_skip" in name
    }
    save_routers(model, job.output, state=routers, extra={**tuned.extra, "base": job.base_identity})
    (job.output / TEMPLATE).write_text(job.tokenizer.chat_template, encoding="utf-8")
    if isinstance(model, PeftModel):
        write_folder(
            job.output / "adapter", partial(model.save_pretrained, state_dict=weights, save_embedding_layers=False)
        )
    elif job.command.routing.trains == "full":
        write_folder(job.output / "model", partial(model.save_pretrained, state_dict=weights))
        job.tokenizer.save_pretrained(job.output / "model")


def _router_name(name: str) -> str:
    """A router's name in a peft model → its name in a checkpoint of the routed model."""
    return name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")


def write_folder(folder: Path, write: Any) -> None:
    """Fill a folder under a temporary name, then put it in place."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
