"""Straight-through training of token-level routers at exact budgets: thresholds hold the budget, the gradient ranks.

Every micro-batch draws a budget. A pass without a graph in which everything runs gives two things: the thresholds,
as a quantile of its logits, and what the dense model predicts, which the routed model is to keep predicting. The
gradient of the scores is centred by a price on capacity: without it, it says above all "run more", which thresholds
undo and which hides the ranking.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from router_tuning.model import RoutingLog, capacity_penalty, record_routing, routed_modules
from router_tuning.tuning.customized_trainer import RouterTrainer


@dataclass(frozen=True)
class TrainSettings:
    """How token-level routers are trained; :func:`training_with` replaces it for an experiment.

    Attributes:
        budgets: lowest and highest that a micro-batch draws. Above them almost any ranking keeps the dense model's
            answers. even: drawn evenly, else evenly on a logarithmic scale.
        price_rate: how fast the price follows the benefit of capacity.
        whiten: how far to train in coordinates in which what routers see has unit covariance
            (:mod:`whitening`): 0 not at all, 1 entirely.
    """

    budgets: tuple[float, float] = (0.05, 0.75)
    even: bool = True
    price_rate: float = 0.3
    whiten: float = 0.5

    def draw(self) -> float:
        """A budget, from torch's generator."""
        (low, high), share = self.budgets, float(torch.rand(()))
        if self.even:
            return low + (high - low) * share
        return low * math.exp(share * math.log(high / low))


_settings = TrainSettings()


def current_settings() -> TrainSettings:
    """Those that hold here."""
    return _settings


@contextmanager
def training_with(settings: TrainSettings) -> Iterator[None]:
    """Train with other settings inside the block."""
    global _settings
    before, _settings = _settings, settings
    try:
        yield
    finally:
        _settings = before


class Price(TrainerCallback, ExportableState):
    """What a unit of mean capacity costs in the loss: follows the mean benefit that the gradient finds in one."""

    def __init__(self, value: float) -> None:
        self.value: Tensor | float = value
        self.excess: Tensor | float = 0.0  # benefit of a unit of capacity less its price, summed over a step

    def watch(self, log: RoutingLog, scale: float = 1.0) -> None:
        """Collect the mean benefit in the backward pass of what ``log`` recorded; ``scale``: of the gradient."""
        for record in (record for records in log.records.values() for record in records):
            if record.logits is not None and record.logits.requires_grad:
                score = torch.sigmoid(record.logits.detach())
                slope = (score * (1 - score)).mean() * scale
                record.logits.register_hook(lambda gradient, slope=slope: self._collect(gradient, slope))

    def _collect(self, gradient: Tensor, slope: Tensor) -> None:
        self.excess = self.excess - gradient.sum() / slope

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move the price towards the benefit; the same on all processes."""
        excess = torch.as_tensor(self.excess, dtype=torch.float32)
        if dist.is_available() and dist.is_initialized():
            excess = excess.to(args.device)
            dist.all_reduce(excess)
            excess = excess / dist.get_world_size()
        self.value = (self.value + _settings.price_rate * excess).clamp(min=0)
        self.excess = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {"value": float(self.value)}, "attributes": {}}


class BudgetTrainer(RouterTrainer):
    """Minimises the divergence of the routed from the dense model's predictions at drawn budgets.

    Where more than routers trains there is no dense self to keep to, and the task loss takes its place. Thresholds are
    set on each micro-batch by itself, so a run depends, a little, on how steps are cut into micro-batches.

    Args:
        price: the price of capacity to start from. distil: whether only routers train.
    """

    def __init__(self, *args, price: float, distil: bool, **kwargs) -> None:
        super().__init__(*args, gradient_scale=0.0, **kwargs)
        self.price, self.distil = Price(price), distil
        self.add_callback(self.price)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The loss of a micro-batch at a budget drawn for it."""
        plain = {key: value for key, value in inputs.items() if key != "labels"}
        learnt = inputs["labels"][:, 1:] != -100
        budget = _settings.draw()
        dense = self._set_thresholds(model, plain, learnt, budget)
        counted = num_items_in_batch is not None
        with record_routing(model) as log:
            if self.distil:
                outputs = model(**plain, use_cache=False)
                predicted = log_softmax(outputs.logits[:, :-1][learnt].float(), dim=-1)
                task = kl_div(predicted, dense, log_target=True, reduction="sum")
                tokens = num_items_in_batch if counted else learnt.sum().clamp(min=1)
                task = task / tokens * (self.accelerator.num_processes if counted else 1)
            else:
                task, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self.price.watch(log)
        steps = self.current_gradient_accumulation_steps
        shares = [record.capacity().to(task.device) for records in log.records.values() for record in records]
        added = self.price.value * torch.stack(shares).mean()
        loss = task + (added / steps if counted else added)
        replicas = self.accelerator.num_processes
        share = task.detach() / replicas if counted else task.detach() / (steps * replicas)
        self.statistics.add(log, share, capacity_penalty(model), inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _set_thresholds(self, model: nn.Module, plain: dict[str, Any], learnt: Tensor, budget: float) -> Tensor | None:
        """Thresholds for ``budget`` on this batch; the dense model's log-probabilities of the learnt tokens."""
        modules = routed_modules(self.model).values()
        for module in modules:
            module.mod_logit = -float("inf")
        training = self.model.training
        model.eval()
        with record_routing(model) as log:
            logits = model(**plain, use_cache=False).logits
        model.train(training)
        found = []
        for record in (record for records in log.records.values() for record in records):
            found.append((record.logits if record.real is None else record.logits[record.real]).flatten())
        threshold = share_threshold(found, budget)
        for module in modules:
            module.mod_logit = threshold
        return log_softmax(logits[:, :-1][learnt].float(), dim=-1) if self.distil else None

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        states = json.loads((folder / TRAINER_STATE_NAME).read_text())["stateful_callbacks"]
        self.price.value = torch.tensor(states[Price.__name__]["args"]["value"], device=self.args.device)


def share_threshold(logits: Sequence[Tensor], share: float) -> Tensor:
    """The value that ``share`` of the logits reaches, routers weighing alike: 0-d, on the device (no host sync)."""
    device = logits[0].device
    values, order = torch.cat([part.to(device) for part in logits]).sort(descending=True)
    weight = torch.cat([torch.full((len(p),), 1 / (len(p) * len(logits)), device=device) for p in logits])
    above = (weight[order].double().cumsum(0) <= share).sum()
    return values[above.clamp(min=1) - 1]
