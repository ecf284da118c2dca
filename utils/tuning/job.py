"""What a recipe gets and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.tuning.arguments import TuningArguments
from router_tuning.tuning.calibration import drawn_rows
from router_tuning.tuning.command_line import Command
from router_tuning.tuning.interruption import Interruption
from router_tuning.tuning.preparation import Preparation
from router_tuning.tuning.tuning_data import TrainingData


@dataclass
class TuningJob:
    """A loaded and routed base in which what trains requires a gradient, and its encoded data.

    Attributes:
        settings: what a run must share with a checkpoint to continue it.
        base_fingerprint: what tells the base from others, for ``router_config.json``; read before an engine cuts the
            weights.
        resume: the checkpoint to continue, complete and checked.
        skip_explained: share of each module's variance that its skip path explained where it was fitted.
    """

    preparation: Preparation
    model: PreTrainedModel
    data: TrainingData
    settings: dict[str, Any]
    base_fingerprint: dict[str, Any]
    interruption: Interruption
    resume: Path | None = None
    skip_explained: dict[str, float] = field(default_factory=dict)

    @property
    def command(self) -> Command:
        """The checked command line."""
        return self.preparation.command

    @property
    def training(self) -> TuningArguments:
        """The Trainer's part of it."""
        return self.preparation.command.training

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the template that the run renders conversations in."""
        return self.preparation.tokenizer

    def rows(self, tokens: int) -> list[dict[str, list[int]]]:
        """Rows of the training data, drawn until they hold so many tokens."""
        return drawn_rows(self.data, self.training.seed, tokens)

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return self.preparation.output


@dataclass
class TunedRun:
    """Outcome of a recipe: of its ``tune(job)``, completed by its ``measure(job, tuned)`` once that is saved.

    Attributes:
        trainer: gives the trained weights (``gather_trained``), collective.
        history: one dict per log line, with ``step``, losses and ``capacity*``.
        measured: capacities of the final routers, as :meth:`RouterTrainer.measure_capacity` gives them.
        interrupted: a signal ended it; the checkpoint is there, results are not.
        extra: entries for ``router_config.json`` (calibration).
        weights: all that trained, whole, by name.
    """

    trainer: Any
    history: list[dict[str, Any]]
    measured: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def model(self) -> PreTrainedModel:
        """The trained model, out of its engine's wrapper."""
        return self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)
