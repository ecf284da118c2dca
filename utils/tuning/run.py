"""A tuning run: what can be checked before weights are loaded, and then the routed base with its encoded data."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.bases.description import dense_config, fingerprint
from router_tuning.bases.shards import tensor_shapes, weight_map
from router_tuning.errors import UserError
from router_tuning.model import load_routers, route
from router_tuning.model.saving import WEIGHTS_NAME, read_router_config, read_router_weights
from router_tuning.tuning.batching import Collator, Row, StepOrder, drawn_rows, in_batches, inputs_of
from router_tuning.tuning.command.arguments import RoutingArguments, TuningArguments, layers_text
from router_tuning.tuning.command.command_line import Command
from router_tuning.tuning.duration import tell_duration
from router_tuning.tuning.encoding import load_tokenizer, template_kind
from router_tuning.tuning.placement import CHOICE_TOKENS, PATH_TOKENS, choose, fit_paths
from router_tuning.tuning.run_folder import check_folder, default_folder
from router_tuning.tuning.trainer import checkpoints
from router_tuning.tuning.trainer.interruption import StopOnSignal
from router_tuning.tuning.tuning_data import RawData, TrainingData, check_file, encode_file, tokenizer_hash
from router_tuning.tuning.tuning_model import (
    cpu_dtype,
    identify,
    load_base,
    locate_base,
    mark_trainable,
    routing_of,
)


class Run:
    """A checked command with its base, tokenizer and data; after :meth:`load` what a recipe trains, too.

    Attributes:
        model: routed, and only what trains requires a gradient. data: encoded.
        settings: what a run must share with a checkpoint to continue it.
        base_fingerprint: for ``router_config.json``; read before an engine cuts the weights.
        resume: the checkpoint to continue, complete and checked, or None. notes: on how it was chosen.
        skip_explained: share of each module's variance that its skip path explained where it was fitted.

    Raises:
        UserError: in the constructor, one line for what is wrong with base, routing, tokenizer, data, output folder
            or the checkpoint to continue.
    """

    model: PreTrainedModel
    data: TrainingData
    base_fingerprint: dict[str, Any]
    skip_explained: dict[str, float]

    def __init__(self, command: Command, stop: StopOnSignal | None = None) -> None:
        self.command, self.training, self.routing = command, command.training, command.routing
        self.stop = stop or StopOnSignal()
        model, data, training, routing = command.model, command.data, command.training, command.routing
        if training.output_dir in (None, "trainer_output"):
            training.output_dir = str(default_folder(command))
        self.base = locate_base(model)
        self.config = dense_config(self.base, model.trust_remote_code)
        self.config.use_cache = False
        if model.dtype == "auto":
            model.dtype = cpu_dtype(sum(map(math.prod, tensor_shapes(weight_map(self.base)).values())))
        routing_of(self.config, routing)
        if routing.router_dir:
            read_router_config(routing.router_dir), read_router_weights(routing.router_dir)
        self.tokenizer = load_tokenizer(model.tokenizer_name or self.base, data.chat_template, model.trust_remote_code)
        self.tokenizer.padding_side = "right"
        self.collator = Collator(self.tokenizer)
        data.chat_template = template_kind(self.tokenizer)
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(data.max_seq_length, positions or data.max_seq_length)
        self.output = Path(training.output_dir)
        check_folder(self.output, training.resume_from_checkpoint is not None, training.overwrite_output_dir)
        self.resume, self.notes = checkpoints.chosen(training.resume_from_checkpoint, self.output)
        plugin, needs = training.deepspeed_plugin, _needs_whole(routing)
        if needs and plugin and plugin.zero_stage == 3:
            raise UserError(f"{needs} needs whole weights on every process: use ZeRO stage 2 or lower")
        self._adopt_layers()
        self.raw: RawData = check_file(data.path, data.max_train_samples)
        self.steps = steps_of(training, self.raw.rows)
        if self.steps < 1 and (routing.recipe != "budget" or routing.trains != "routers"):
            raise UserError(f"--num_train_epochs {training.num_train_epochs:g}: the run has no step")
        if self.resume is not None:  # one process that checks for several knows nothing of their engine
            checkpoints.check_settings(self.resume, self.settings, ("deepspeed",) if training.check_inputs else ())

    def _adopt_layers(self) -> None:
        """In place of ``--mod_layers auto`` the layers that were chosen: of the checkpoint, or the start routers."""
        if self.routing.mod_layers != "auto":
            return
        if self.resume is not None:
            self.routing.mod_layers = checkpoints.settings_of(self.resume).get("mod_layers", "auto")
        elif self.routing.router_dir:
            layers = read_router_config(self.routing.router_dir)["mod_layers"]
            self.routing.mod_layers = layers_text(layers if isinstance(layers, dict) else {"": layers})

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to continue it to the same result.

        Every argument that changes what is learnt and is not at its default (a new one is among them by itself), and
        the content of what arguments point to.
        """
        aside = checkpoints.NEUTRAL | checkpoints.ORIGINS
        given = {name: value for name, value in self.command.given().items() if name not in aside}
        return given | self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        routers, plugin = self.routing.router_dir, self.training.deepspeed_plugin
        start = routers and hashlib.sha256(Path(routers, WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
        return {
            "base": fingerprint(self.base),
            "tokenizer": tokenizer_hash(self.tokenizer)[:16],
            "data": f"{self.raw.rows} rows, sha256 {self.raw.sha256[:16]}",
            "router_dir": start,
            "deepspeed": plugin and f"ZeRO-{plugin.zero_stage} on {self.training.world_size} processes",
        }

    # ---- loading

    def encode(self) -> None:
        """Encode the data; UserError for rows, or padding, with ids that the base's embedding has not."""
        data = encode_file(self.raw, self.tokenizer, self.max_length, self.command.data.preprocessing_num_workers)
        largest, size = max(data.largest_id, self.tokenizer.pad_token_id), self.config.get_text_config().vocab_size
        if largest >= size:
            raise UserError(
                f"--tokenizer_name {self.tokenizer.name_or_path}: its ids reach {largest} in the data, the base's "
                f"embedding has vocab_size {size}: this tokenizer belongs to another base"
            )
        self.data = data

    def load(self) -> None:
        """Load the base, choose what is routed, route it, fit what skipped tokens get, and mark what trains.

        Where a run is resumed, or starts from saved routers, layers and paths are theirs. Ranks compute the same.

        Raises:
            UserError: for a base that cannot be loaded or routed so.
        """
        model = load_base(self.base, self.command.model, self.config)
        tell_duration(self, model)
        try:
            self.skip_explained = self._add_routing(model)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.model = mark_trainable(model, self.routing)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.base_fingerprint = identify(self.model, self.base)

    def _add_routing(self, model: PreTrainedModel) -> dict[str, float]:
        routing = self.routing
        if routing.mod_layers == "auto" or routing.skip != "zero":
            model.to(self.training.device)
        if routing.mod_layers == "auto":
            batches = in_batches(self.rows(CHOICE_TOKENS), self.collator, size=8, tokens=1024)
            choose(model, routing, batches, self.training.seed)
        route(model, **vars(routing_of(self.config, routing)))
        if routing.router_dir:
            load_routers(model, routing.router_dir)
        elif routing.skip != "zero" and self.resume is None:
            return fit_paths(model, inputs_of(self.rows(PATH_TOKENS), self.collator))
        return {}

    @property
    def trainer_options(self) -> dict[str, Any]:
        """What a trainer of any kind is made with, once everything is loaded."""
        training, grouped = self.training, self.command.data.length_grouping
        return {
            "model": self.model,
            "args": training,
            "train_dataset": self.data.rows,
            "data_collator": self.collator,
            "callbacks": [self.stop],
            "target_capacity": self.routing.target_capacity,
            "order": StepOrder(self.data.lengths, training.global_batch_size, training.seed, grouped),
            "settings": self.settings,
        }

    def rows(self, tokens: int, other: bool = False) -> list[Row]:
        """Rows of the training data, see :func:`~router_tuning.tuning.batching.drawn_rows`."""
        return drawn_rows(self.data, self.training.seed, tokens, other)


@dataclass
class TunedRun:
    """Outcome of a recipe: of its ``tune(run)``, completed by its ``measure(run, tuned)`` once that is saved.

    Attributes:
        trainer: which trained, with its log.
        extra: entries for ``router_config.json`` (calibration).
        measured: capacities of the final routers, as :meth:`RouterTrainer.measure_capacity` gives them.
        weights: all that was learnt, whole, by name.
    """

    trainer: Any
    extra: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        """The trained model, out of its engine's wrapper."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)


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
