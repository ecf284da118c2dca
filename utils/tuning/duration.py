"""How long a run takes: the tokens that it reads, at the speed of one forward pass on this machine."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.tuning.trainer.engines import requested

if TYPE_CHECKING:
    from router_tuning.tuning.run import Run

LONG = 3600.0
"""Seconds beyond which a run is told how to be short."""
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


def backward_passes(model: PreTrainedModel, tokens: int) -> float:
    """How many forward passes the backward pass of frozen weights takes, by one sequence of at most ``tokens``.

    By its operations it is one; SmolLM2-135M's took 1.4 on one core, in bfloat16.
    """
    hidden: list[Tensor] = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda *called: hidden.append(called[-1].requires_grad_()))
    ids = torch.arange(tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        for length in (16, tokens, tokens):  # the first two warm up
            batch = ids[:, :length]
            started = time.perf_counter()
            with torch.enable_grad():
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.item()  # waits for a GPU
            middle = time.perf_counter()
            torch.autograd.grad(loss, hidden[-1])[0].sum().item()
            ended = time.perf_counter()
            if ended - started > 2:  # the largest model needs no second look
                break
    finally:
        hook.remove()
    return (ended - middle) / (middle - started)


def tokens_read(run: Run, backward: float = 1.0) -> float:
    """What is left of training and, of ``budget``, start and calibration: tokens in passes through the dense base.

    Args:
        backward: forward passes that a backward pass towards the first layer takes, see :func:`backward_passes`.
    """
    routing, lengths, budget = run.routing, run.data.lengths, run.command.budget
    layers = run.config.get_text_config().num_hidden_layers
    deep = 1.0 if routing.mod_layers == "auto" else (routing.mod_n or layers) / layers
    passes = 1 + backward * (2 if routing.trains == "full" else deep)
    passes *= 2 if routing.recipe == "budget" else 1  # the dense model beside, and a second loss backwards
    steps = run.steps - (int(run.resume.name.rpartition("-")[2]) if run.resume else 0)
    found = passes * steps * run.training.global_batch_size * sum(lengths) / len(lengths)
    if routing.recipe == "budget":
        times = 4 if set(routing.config().parts.values()) == {"sequence"} else 1
        fitted = 1 if run.resume or routing.router_dir else 3 + backward  # routers that are there keep their start
        found += fitted * times * min(budget.label_tokens, sum(lengths) / times)  # rows are drawn once
        found += 8 * min(budget.calibration_tokens, sum(lengths))
    return found


@torch.no_grad()
def tell_duration(run: Run, model: PreTrainedModel) -> None:
    """Log how long the run takes, and where that is hours, what makes it shorter; all ranks alike."""
    if requested() not in ("one process", "ddp"):
        return  # an engine has cut the weights, or will
    model.to(run.training.device)
    length = min(256, run.max_length)
    rate = reading_rate(model, run.training.per_device_train_batch_size, length)
    seconds = tokens_read(run, backward_passes(model, length)) / (rate * run.training.world_size)
    logger.info(f"estimate: about {in_words(seconds)} (one pass reads {rate:,.0f} tokens a second here)")
    if seconds > LONG:
        logger.warning(
            f"this run takes about {in_words(seconds)} on this machine: fewer --max_train_samples or, where routers "
            "are fitted in closed form, fewer --label_tokens and --calibration_tokens make it shorter"
        )


def in_words(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 100:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 2 * LONG else f"{seconds / LONG:.1f} hours"
