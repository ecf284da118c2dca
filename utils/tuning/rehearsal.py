"""A run looked at before it runs: arguments tried on a tiny model, what makes it doubtful, and how long it takes."""

from __future__ import annotations

import copy
import logging
import tempfile
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, get_scheduler

from router_tuning.errors import UserError
from router_tuning.tuning.command.arguments import DEFAULTS, TuningArguments
from router_tuning.tuning.trainer.engines import requested

if TYPE_CHECKING:
    from router_tuning.tuning.run import Run

LONG = 3600.0
"""Seconds beyond which a run is told how to be short."""
SHORT = 900.0
"""Seconds that the shorter run should take."""
_TINY = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
_STEPS = 100  # of the schedule that is tried; a run's own are not known yet
_FEW_STEPS = 10
_BACKWARD = 2.0  # of a module's input and weights, in forward passes; of a frozen one's input alone, half
logger = logging.getLogger(__name__)


def tried(typed: Mapping[str, Any]) -> TuningArguments:
    """The Trainer's arguments from their values, with which a Trainer, its optimizer and its schedule can be built.

    Raises:
        UserError: one line that names the argument that, left out, would let the rest work.
    """
    try:
        return _build(typed)
    except UserError:
        raise
    except Exception as error:  # of transformers, accelerate, torch, numpy, or of a package that is not installed
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        found = [name for name, value in typed.items() if value != DEFAULTS[name] and _works(typed, name)]
        raise UserError(f"{' or '.join(f'--{name} {typed[name]}' for name in found)}: {reason}") from None


def _works(typed: Mapping[str, Any], name: str) -> bool:
    try:
        _build({**typed, name: DEFAULTS[name]})
    except Exception:
        return False
    return True


def _build(typed: Mapping[str, Any]) -> TuningArguments:
    training = TuningArguments(**typed)
    # Several processes are checked as one before they start, and a plan is one for other machines.
    if requested() == "one process" and not (training.dry_run or training.deepspeed or training.fsdp):
        with tempfile.TemporaryDirectory() as folder:
            arguments = copy.copy(training)
            arguments.output_dir = folder
            trainer = Trainer(
                model=LlamaForCausalLM(_TINY), args=arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}]
            )
            trainer.get_train_dataloader()
            trainer.create_optimizer_and_scheduler(_STEPS)
    return training


def doubts(training: TuningArguments, steps: int) -> list[str]:
    """What makes it unlikely that so many steps learn anything, one line each; none for a run without steps."""
    found = []
    if steps and not _learns(training, steps):
        found.append(
            f"the learning rate is 0 at each of the {steps} steps (--learning_rate {training.learning_rate:g}, "
            f"--warmup_steps {training.warmup_steps:g}): nothing is learnt"
        )
    if 0 < steps < _FEW_STEPS:
        found.append(
            f"{steps} steps are few to learn anything in: more rows (MAX_TRAIN_SAMPLES), more epochs (NUM_EPOCHS) "
            "or a smaller GLOBAL_BATCH_SIZE give more"
        )
    return found


def _learns(training: TuningArguments, steps: int) -> bool:
    """Whether the learning rate is above zero at one of the steps at least."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=training.learning_rate)
    schedule = get_scheduler(
        training.lr_scheduler_type,
        optimizer,
        num_warmup_steps=training.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=training.lr_scheduler_kwargs,
    )
    for _ in range(steps):
        if schedule.get_last_lr()[0] > 0:
            return True
        optimizer.step()
        schedule.step()
    return False


# ---- how long it takes: what it reads, at the speed of one forward pass


@torch.no_grad()
def reading_rate(model: PreTrainedModel, rows: int = 4, tokens: int = 256) -> float:
    """Tokens per second that a model reads, from at most ``rows`` sequences of ``tokens`` random tokens; seconds."""
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    size, rate = model.config.get_text_config().vocab_size, 1.0
    for shape in ((1, 16), (1, tokens), (rows, tokens)):
        batch = torch.randint(size, shape, generator=generator).to(model.device)
        started = time.perf_counter()
        float(model(input_ids=batch, use_cache=False).logits[0, -1, 0])  # waits for a GPU
        took = time.perf_counter() - started
        rate = batch.numel() / took
        if took > 2:  # the largest model needs no second look
            break
    return rate


def phases(run: Run) -> dict[str, tuple[float, str, float]]:
    """Of each phase tokens, of forward passes through the dense base, and the setting behind them with its value."""
    routing, lengths = run.routing, run.data.lengths
    layers = run.config.get_text_config().num_hidden_layers
    deep = 1.0 if routing.mod_layers == "auto" else (routing.mod_n or layers) / layers
    passes = (2 if routing.recipe == "budget" else 1) + _BACKWARD * (1 if routing.trains == "full" else deep / 2)
    trained = run.steps * run.training.global_batch_size * sum(lengths) / len(lengths)
    found = {"training": (passes * trained, "max_train_samples", len(lengths))} if trained else {}
    if routing.recipe == "budget":
        times = 4 if set(routing.config().parts.values()) == {"sequence"} else 1
        label = min(run.command.budget.label_tokens, sum(lengths) / times)  # rows are drawn once
        calibration = min(run.command.budget.calibration_tokens, sum(lengths))
        found["closed form"] = (4 * times * label, "label_tokens", label)
        found["calibration"] = (8 * calibration, "calibration_tokens", calibration)
    return found


def tell(run: Run, model: PreTrainedModel) -> None:
    """Log how long the run takes, and where that is hours, the setting that makes it minutes; all ranks alike."""
    if requested() not in ("one process", "ddp"):
        return  # an engine has cut the weights, or will
    if model.device.type != run.training.device.type:  # a quantised base is there already, and must not be moved
        model.to(run.training.device)
    rate = reading_rate(model, run.training.per_device_train_batch_size, min(256, run.max_length))
    rate *= run.training.world_size
    found = phases(run)
    total = sum(tokens for tokens, _, _ in found.values()) / rate
    parts = ", ".join(f"{phase} {duration(tokens / rate)}" for phase, (tokens, _, _) in found.items())
    logger.info(f"estimate: about {duration(total)} ({parts}; one pass reads {rate:,.0f} tokens a second here)")
    if total > LONG:
        phase, (tokens, name, value) = max(found.items(), key=lambda pair: pair[1][0])
        number = max(run.training.global_batch_size if phase == "training" else 1, int(value * SHORT * rate / tokens))
        logger.warning(
            f"this run takes about {duration(total)} on this machine; --{name} {number} makes its {phase} about "
            f"{duration(number / value * tokens / rate)}"
        )


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * LONG else f"{seconds / LONG:.1f} hours"
