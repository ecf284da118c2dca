"""Everything about a run that can be checked before weights are loaded."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.model.saving import WEIGHTS_NAME, read_router_config, read_router_weights
from router_tuning.tuning import checkpoints
from router_tuning.tuning.arguments import RoutingArguments, TuningArguments, layers_text
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.encoding import load_tokenizer, template_kind
from router_tuning.tuning.rehearsal import learns_at
from router_tuning.tuning.run_folder import check_folder, default_folder
from router_tuning.tuning.tuning_data import RawData, TrainingData, check_file, encode_file, tokenizer_hash
from router_tuning.tuning.tuning_model import dense_config, fingerprint, locate_base, routing_of

_FEW_STEPS = 10


class Preparation:
    """A checked command with its base, tokenizer and data.

    Raises:
        UserError: in the constructor, one line for what is wrong with base, routing, tokenizer, data or output folder.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        model, data, training = command.model, command.data, command.training
        self.base = locate_base(model)
        self.config = dense_config(self.base, model)
        routing_of(self.config, command.routing)
        if command.routing.router_dir:
            read_router_config(command.routing.router_dir), read_router_weights(command.routing.router_dir)
        self.tokenizer = load_tokenizer(model.tokenizer_name or self.base, data.chat_template, model.trust_remote_code)
        self.tokenizer.padding_side = "right"
        data.chat_template = template_kind(self.tokenizer)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(data.max_seq_length, positions or data.max_seq_length)
        if training.output_dir in (None, "trainer_output"):
            training.output_dir = str(default_folder(command))
        self.output = Path(training.output_dir)
        check_folder(self.output, training.resume_from_checkpoint is not None, training.overwrite_output_dir)
        if (
            (plugin := training.deepspeed_plugin)
            and plugin.zero_stage == 3
            and (told := _needs_whole(command.routing))
        ):
            raise UserError(f"{told} needs whole weights on every process: use ZeRO stage 2 or lower")
        self._adopt_layers()
        self.raw: RawData = check_file(data.path, data.max_train_samples)
        self.steps = steps_of(training, self.raw.rows)
        if self.steps < 1 and (command.routing.recipe != "budget" or command.routing.trains != "routers"):
            raise UserError(f"--num_train_epochs {training.num_train_epochs:g}: the run has no step")

    def _adopt_layers(self) -> None:
        """In place of ``--mod_layers auto`` the layers that were chosen: of the checkpoint, or the start routers."""
        routing = self.command.routing
        if routing.mod_layers != "auto":
            return
        folder, _ = checkpoints.chosen(self.command.training.resume_from_checkpoint, self.output)
        if folder is not None:
            routing.mod_layers = checkpoints.settings_of(folder).get("mod_layers", "auto")
        elif routing.router_dir:
            layers = read_router_config(routing.router_dir)["mod_layers"]
            routing.mod_layers = layers_text(layers if isinstance(layers, dict) else {"": layers})

    def check_checkpoint(self) -> None:
        """UserError if the checkpoint to continue belongs to another run, as far as one process can tell."""
        folder, _ = checkpoints.chosen(self.command.training.resume_from_checkpoint, self.output)
        if folder is not None:
            checkpoints.check_settings(folder, self.settings(), unknown=("deepspeed",))

    def settings(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to continue it to the same result.

        Every argument that changes what is learnt and is not at its default (a new one is among them by itself), and
        the content of what arguments point to.
        """
        routers, plugin = self.command.routing.router_dir, self.command.training.deepspeed_plugin
        start = routers and hashlib.sha256(Path(routers, WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
        world = self.command.training.world_size
        given = {
            name: value
            for name, value in self.command.given().items()
            if name not in checkpoints.NEUTRAL | checkpoints.ORIGINS
        }
        return given | {
            "base": fingerprint(self.base),
            "tokenizer": tokenizer_hash(self.tokenizer)[:16],
            "data": f"{self.raw.rows} rows, sha256 {self.raw.sha256[:16]}",
            "router_dir": start,
            "deepspeed": plugin and f"ZeRO-{plugin.zero_stage} on {world} processes",
        }

    def doubts(self, rows: int) -> list[str]:
        """What makes it unlikely that a run on so many rows learns anything, one line each."""
        training, routing = self.command.training, self.command.routing
        searched = routing.recipe == "budget" and set(routing.config().parts.values()) == {"sequence"}
        steps = steps_of(training, rows)
        if searched or not steps:
            return []  # nothing is trained by steps
        found = []
        if not learns_at(training, steps):
            found.append(
                f"the learning rate is 0 at each of the {steps} steps (--learning_rate {training.learning_rate:g}, "
                f"--warmup_steps {training.warmup_steps:g}): nothing is learnt"
            )
        if steps < _FEW_STEPS:
            found.append(
                f"{steps} steps are few to learn anything in: more rows (MAX_TRAIN_SAMPLES), more epochs (NUM_EPOCHS) "
                "or a smaller GLOBAL_BATCH_SIZE give more"
            )
        return found

    def encode(self) -> TrainingData:
        """The data, encoded; UserError for rows, or padding, with ids that the base's embedding has not."""
        processes = self.command.data.preprocessing_num_workers
        data = encode_file(self.raw, self.tokenizer, self.max_length, processes)
        largest, size = max(data.largest_id, self.tokenizer.pad_token_id), self.config.get_text_config().vocab_size
        if largest >= size:
            raise UserError(
                f"--tokenizer_name {self.tokenizer.name_or_path}: its ids reach {largest} in the data, the base's "
                f"embedding has vocab_size {size}: this tokenizer belongs to another base"
            )
        return data


def _needs_whole(routing: RoutingArguments) -> str | None:
    """The argument that needs weights which no engine has cut up, or None."""
    if routing.recipe != "paper":
        return f"--recipe {routing.recipe}"
    if routing.mod_layers == "auto":
        return "--mod_layers auto"
    return None if routing.skip == "zero" else f"--skip {routing.skip}"


def steps_of(training: TuningArguments, rows: int) -> int:
    """Optimizer steps of a run on so many rows; UserError for rows that do not fill one."""
    per_epoch = StepOrder([0] * rows, training.global_batch_size, training.seed).steps
    return training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * per_epoch)
