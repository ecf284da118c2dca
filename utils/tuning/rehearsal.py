"""Arguments of the Trainer, tried on a tiny model: what cannot work fails before a base is loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, get_scheduler

from router_tuning.errors import UserError
from router_tuning.tuning.arguments import DEFAULTS, TuningArguments
from router_tuning.tuning.engines import requested

_TINY = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
_STEPS = 100  # of the schedule that is tried; a run's own are not known yet


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


def learns_at(training: TuningArguments, steps: int) -> bool:
    """Whether the learning rate is above zero at one of ``steps`` steps at least."""
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
