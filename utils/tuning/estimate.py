"""How long a run will take on this machine, told before it starts: what it reads, at the speed of one forward pass."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from router_tuning.tuning.engines import requested

if TYPE_CHECKING:
    from router_tuning.tuning.run import Run

LONG = 3600.0
"""Seconds beyond which a run is told how to be short."""
SHORT = 900.0
"""Seconds that the shorter run should take."""
_BACKWARD = 2.0  # of a module's input and weights, in forward passes; of a frozen one's input alone, half
logger = logging.getLogger(__name__)


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


def tokens_read(run: Run) -> dict[str, float]:
    """What a run reads, phase by phase, in tokens of a forward pass through the dense base."""
    routing, budget, lengths = run.routing, run.command.budget, run.data.lengths
    layers = run.config.get_text_config().num_hidden_layers
    mean = sum(lengths) / len(lengths)
    deep = 1.0 if routing.mod_layers == "auto" else (routing.mod_n or layers) / layers
    backward = _BACKWARD if routing.trains == "full" else _BACKWARD / 2 * deep
    trained = run.steps * run.training.global_batch_size * mean
    if routing.recipe == "paper":
        return {"training": trained * (1 + backward)}
    calibration = {"calibration": 8 * budget.calibration_tokens}
    sequence = set(routing.config().parts.values()) == {"sequence"}
    start = 4 * budget.label_tokens * (4 if sequence else 1)
    return {"closed form": start, "training": trained * (2 + backward)} | calibration


def tell(run: Run, model: PreTrainedModel) -> None:
    """Log how long the run takes, and where that is hours, the setting that makes it minutes; all ranks alike."""
    if requested() not in ("one process", "ddp"):
        return  # an engine has cut the weights, or will
    if model.device.type != run.training.device.type:  # a quantised base is there already, and must not be moved
        model.to(run.training.device)
    rate = reading_rate(model, run.training.per_device_train_batch_size, min(256, run.max_length))
    rate *= run.training.world_size
    seconds = {phase: tokens / rate for phase, tokens in tokens_read(run).items()}
    total = sum(seconds.values())
    parts = ", ".join(f"{phase} {duration(part)}" for phase, part in seconds.items())
    logger.info(f"estimate: about {duration(total)} ({parts}; one pass reads {rate:,.0f} tokens a second here)")
    if total > LONG:
        logger.warning(f"this run takes about {duration(total)} on this machine; {shorter(run, seconds)}")


def shorter(run: Run, seconds: dict[str, float]) -> str:
    """The setting with which the longest phase takes minutes."""
    phase = max(seconds, key=seconds.__getitem__)
    share = SHORT / seconds[phase]
    name, value = {
        "training": ("max_train_samples", len(run.data.rows)),
        "closed form": ("label_tokens", run.command.budget.label_tokens),
        "calibration": ("calibration_tokens", run.command.budget.calibration_tokens),
    }[phase]
    number = max(1, int(value * share))
    if phase == "training":
        number = max(run.training.global_batch_size, number)
    return f"--{name} {number} makes its {phase} about {duration(number / value * seconds[phase])}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours in words."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * LONG else f"{seconds / LONG:.1f} hours"
