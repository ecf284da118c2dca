"""Everything about a run that can be checked before weights are loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from router_tuning.errors import UserError
from router_tuning.model.saving import WEIGHTS_NAME
from router_tuning.tuning import checkpoints
from router_tuning.tuning.arguments import NEUTRAL, ORIGINS
from router_tuning.tuning.batching import StepOrder
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.encoding import load_tokenizer, template_kind
from router_tuning.tuning.run_folder import check_folder, default_folder
from router_tuning.tuning.tuning_data import RawData, TrainingData, check_file, encode_file, tokenizer_hash
from router_tuning.tuning.tuning_model import dense_config, fingerprint, locate_base, routing_of


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
        self.tokenizer = load_tokenizer(model.tokenizer_name or self.base, data.chat_template, model.trust_remote_code)
        self.tokenizer.padding_side = "right"
        data.chat_template = template_kind(self.tokenizer)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(data.max_seq_length, positions or data.max_seq_length)
        if training.output_dir in (None, "trainer_output"):
            training.output_dir = str(default_folder(command))
        self.output = Path(training.output_dir)
        check_folder(self.output, training.resume_from_checkpoint is not None, training.overwrite_output_dir)
        self.raw: RawData = check_file(data.path, data.max_train_samples)
        StepOrder([0] * self.raw.rows, training.global_batch_size, training.seed)

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
        given = {name: value for name, value in self.command.given().items() if name not in NEUTRAL | ORIGINS}
        return given | {
            "base": fingerprint(self.base),
            "tokenizer": tokenizer_hash(self.tokenizer)[:16],
            "data": f"{self.raw.rows} rows, sha256 {self.raw.sha256[:16]}",
            "router_dir": start,
            "deepspeed": plugin and f"ZeRO-{plugin.zero_stage} on {world} processes",
        }

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
