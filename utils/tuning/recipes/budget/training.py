"""Straight-through training of token-level routers at exact budgets: thresholds hold the budget, the gradient ranks.

Every micro-batch draws a budget. A pass without a graph in which everything runs gives two things: the thresholds,
as a quantile of its logits, and what the dense model predicts, which the routed model is to keep predicting. The
gradient of the scores is centred by a multiplier on capacity: without it, it says above all "run more", which
thresholds undo and which hides the ranking.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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
from router_tuning.model.recording import Record
from router_tuning.model.routing import run_decoder
from router_tuning.tuning.customized_trainer import RouterTrainer
from router_tuning.tuning.recipes.budget.settings import BudgetArguments, path_rate
from router_tuning.tuning.recipes.budget.thresholds import routers_that_train, share_threshold


class CapacityMultiplier(TrainerCallback, ExportableState):
    """What a unit of mean capacity costs in the loss: follows the mean benefit that the gradient finds in one.

    Args:
        value: to start from. rate: share of the way to the benefit that a step goes.
    """

    def __init__(self, value: float, rate: float) -> None:
        self.value: Tensor | float = value
        self.rate = rate
        self.excess: Tensor | float = 0.0  # benefit of a unit of capacity less its cost, summed over a step

    def watch(self, log: RoutingLog) -> None:
        """Collect the mean benefit in the backward pass of what ``log`` recorded."""
        for record in _records(log):
            if record.logits is not None and record.logits.requires_grad:
                score = torch.sigmoid(record.logits.detach())
                slope = (score * (1 - score)).mean()
                record.logits.register_hook(lambda gradient, slope=slope: self._collect(gradient, slope))

    def _collect(self, gradient: Tensor, slope: Tensor) -> None:
        self.excess = self.excess - gradient.sum() / slope

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Move towards the benefit; the same on all processes."""
        excess = torch.as_tensor(self.excess, dtype=torch.float32)
        if dist.is_available() and dist.is_initialized():
            excess = excess.to(args.device)
            dist.all_reduce(excess)
            excess = excess / dist.get_world_size()
        self.value = (self.value + self.rate * excess).clamp(min=0)
        self.excess = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"args": {"value": float(self.value), "rate": self.rate}, "attributes": {}}


class BudgetTrainer(RouterTrainer):
    """Minimises the divergence of the routed from the dense model's predictions at drawn budgets.

    Where more than routers trains there is no dense self to keep to, and the task loss takes its place. Thresholds are
    set on each micro-batch by itself, so a run depends, a little, on how steps are cut into micro-batches.

    Args:
        recipe: its settings. weights: share of the routed operations by router, adding up to 1.
        multiplier: the cost of capacity to start from. distil: whether nothing but routing trains.
        norms: of what each router sees, with which ``router_rate`` is the change of a logit per step at any width.
    """

    def __init__(
        self,
        *args,
        recipe: BudgetArguments,
        weights: Mapping[str, float],
        multiplier: float,
        distil: bool,
        norms: Mapping[str, float],
        **kwargs,
    ) -> None:
        super().__init__(*args, gradient_scale=0.0, **kwargs)
        self.recipe, self.distil, self.norms = recipe, distil, norms
        keys = {module.mod_key: name for name, module in routed_modules(self.model).items()}
        self.weights = {key: weights[name] for key, name in keys.items()}
        self.multiplier = CapacityMultiplier(multiplier, self.recipe.multiplier_rate)
        self.add_callback(self.multiplier)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A group per parameter with its rate: routers step by logits, skip paths by a share of their rms."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        routers, groups = routers_that_train(self.model), []
        rates = {id(router.weight): self.recipe.router_rate / self.norms[name] for name, router in routers.items()}
        rates |= {id(getattr(router, "bias", None)): self.recipe.router_rate for router in routers.values()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(id(parameter), self.recipe.other_rate)
                if "mod_skip" in name:
                    rate = path_rate(parameter, self.args.learning_rate)
                groups.append({"params": [parameter], "lr": rate})
        self.optimizer = kind(groups, **options)
        return self.optimizer

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
        low, high = self.recipe.lowest_budget, self.recipe.highest_budget
        dense = self._set_thresholds(model, plain, learnt, low + (high - low) * float(torch.rand(())))
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
        self.multiplier.watch(log)
        capacity = sum(self.weights[key] * r.capacity().to(task.device) for key, rs in log.records.items() for r in rs)
        added = self.multiplier.value * capacity
        loss = task + (added / self.current_gradient_accumulation_steps if counted else added)
        self.note_losses(log, task, capacity_penalty(model), inputs, counted)
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
        seen = [r.logits.flatten() if r.real is None else r.logits[r.real] for r in _records(log)]
        threshold = share_threshold(seen, budget, [self.weights[key] for key in log.records])
        for module in modules:
            module.mod_logit = threshold
        return log_softmax(logits[:, :-1][learnt].float(), dim=-1) if self.distil else None

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        states = json.loads((folder / TRAINER_STATE_NAME).read_text())["stateful_callbacks"]
        value = states[CapacityMultiplier.__name__]["args"]["value"]
        self.multiplier.value = torch.tensor(value, device=self.args.device)


def _records(log: RoutingLog) -> Iterator[Record]:
    return (record for records in log.records.values() for record in records)


@torch.no_grad()
def input_norms(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Mean norm of what each router sees of the real tokens of ``batches`` while everything runs."""
    found: dict[str, list[Tensor]] = {name: [] for name in routed_modules(model)}
    handles = [
        module.mod_router.register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].float().norm(dim=-1).mean())
        )
        for name, module in routed_modules(model).items()
    ]
    try:
        for batch in batches:
            run_decoder(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(torch.stack(norms).mean()) for name, norms in found.items()}
