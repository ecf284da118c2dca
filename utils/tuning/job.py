"""What a recipe gets and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.tuning.command_line import Command
from router_tuning.tuning.interruption import Interruption
from router_tuning.tuning.tuning_data import TrainingData


@dataclass
class TuningJob:
    """A loaded and routed base in which what trains requires a gradient, and its encoded data.

    Attributes:
        max_length: tokens that longer conversations were cut to.
        identity: what a run must share with a checkpoint to continue it.
        base_identity: what tells the base from others, for ``router_config.json``; read before an engine cuts the
            weights.
        resume: the checkpoint to continue, complete and checked.
    """

    command: Command
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    max_length: int
    identity: dict[str, Any]
    base_identity: dict[str, Any]
    interruption: Interruption
    resume: Path | None = None

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.command.training.output_dir)


@dataclass
class TunedRun:
    """Outcome of a recipe.

    Attributes:
        trainer: gives the trained weights (``gather_trained``), collective.
        history: one dict per log line, with ``step``, losses and ``capacity*``.
        measured: capacities of the final routers, as :meth:`RouterTrainer.measure_capacity` gives them.
        interrupted: a signal ended it; the checkpoint is there, results are not.
        extra: entries for ``router_config.json`` (calibration).
    """

    trainer: Any
    history: list[dict[str, Any]]
    measured: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
