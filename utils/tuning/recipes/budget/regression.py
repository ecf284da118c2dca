"""Routers fitted to what skipping costs under their own policy, while the optimizer steps whatever else trains.

The closed form (:mod:`closed_form`) knows what one skipped module does where everything else runs. Here the same is
asked where the others are skipped as the routers have it, at many budgets. With ``L`` the loss (divergence from the
dense model's predictions or, where more than routing trains, the task's), ``g = ∂L/∂m`` of a module's gate and ``s``
that of ``log q(y)`` for ``y`` drawn from the routed model's predictions, ``L(skipped) − L(run) = −g ± s²/2`` to second
order, plus where the module ran and minus where it was skipped: at the dense model ``g`` is zero, and what remains is
Fisher's damage. A score ``z = W·h + b`` predicts the logarithm of that per operation saved, so one regression step per
batch moves it, in the metric of what the router sees: no learning rate, and no gradient through a hard decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from router_tuning.model import capacity_penalty, record_routing, routed_modules
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.recipes.budget.budget_arguments import BudgetArguments
from router_tuning.tuning.recipes.budget.budgets import BINS, Budgets
from router_tuning.tuning.recipes.budget.closed_form import Start
from router_tuning.tuning.recipes.budget.damage import drawn
from router_tuning.tuning.recipes.budget.gates import Gate, Seen, curve_of, gates, predicting, router_of
from router_tuning.tuning.trainer.customized_trainer import RouterTrainer
from router_tuning.tuning.trainer.engine_state import placed
from router_tuning.tuning.trainer.routing_statistics import summed

_CLIP = 40.0
_PRIOR = 1 / 8  # of the decisions that the start was fitted on, as many as it counts for
_GROWTH = 19.0  # divergence grows like exp(19·(share of operations saved))
_KEPT = 128  # decisions of a micro-batch on whose scores thresholds are read off anew after a step


class MicroBatch(NamedTuple):
    """What a forward pass leaves for the routers to learn from after its backward pass.

    Attributes:
        gates: by router, with decisions that the loss speaks of. slopes: gradients of ``log q(y)`` as of the gates'
            ``m``, ``[n, E]``, by router. factor: by which the loss was multiplied.
        budget: ``[b]``. threshold: ``[b]``. predictions: of each sequence, ``[b]``.
    """

    gates: dict[str, Gate]
    slopes: dict[str, Tensor]
    factor: float
    budget: Tensor
    threshold: Tensor
    predictions: Tensor


class RegressionTrainer(RouterTrainer):
    """Fits routers by regression at drawn budgets; the optimizer steps skip paths, adapters or the base.

    Args:
        recipe: its settings. distil: whether the loss is the divergence from the dense model, else the task's.
        inputs: what routers see, by router. start: thresholds, and the ridge under what they see.
        scores: ``W·h + b`` of some decisions, by router.
    """

    def __init__(
        self,
        *args,
        recipe: BudgetArguments,
        distil: bool,
        inputs: Mapping[str, Seen],
        start: Start,
        scores: Mapping[str, Tensor],
        **kwargs,
    ) -> None:
        super().__init__(*args, gradient_scale=0.0, **kwargs)
        self.recipe, self.distil, self.inputs = recipe, distil, inputs
        self.modules, saved = routed_modules(self.model), saved_shares(self.model)
        self.saved = [saved[name] for name in self.modules]
        self.prior = {name: max(1.0, _PRIOR * len(scores[name])) for name in self.modules}
        bias = {name: -logit for name, logit in start.logit.items()}
        lowest = recipe.lowest(self.model.config.mod_target_capacity, sum(self.saved))
        self.policy = Budgets(bias, start.ridge, lowest, recipe.highest_budget)
        self.policy.curve = curve_of([scores[name] for name in self.modules], self.saved, self.policy.grid)
        self._pending: dict[str, Tensor] = {}
        self._kept: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = []

    @cached_property
    def metric(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and ridged factor of what routers see, with the ridge that a checkpoint may have brought."""
        inputs, self.inputs = self.inputs, {}
        return {name: (seen.mean, seen.factor(self.policy.ridge)) for name, seen in inputs.items()}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """A group per parameter: each matrix of a skip path moves by a share of its rms per step."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        rate, other = self.args.learning_rate, self.recipe.other_rate
        groups = [
            {"params": [p], "lr": _path_rate(p, rate) if "mod_skip" in n else other}
            for n, p in self.model.named_parameters()
            if p.requires_grad
        ]
        routers = [router_of(module).weight for module in self.modules.values()]  # of which none gets a gradient
        self.optimizer = kind(groups or routers, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ):
        """The loss at a budget drawn for each row; low ones, which diverge more, weigh less."""
        if self.deepspeed_engine is not None:  # whose forward pass takes any gradient for the one that it steps by
            model = self.model
        plain = {key: value for key, value in inputs.items() if key != "labels"}
        predicts, matters = predicting(inputs["labels"])
        dense = self._dense(model, plain, predicts) if self.distil else None
        budget = self.policy.draw(len(predicts))
        threshold = self.policy.threshold(budget).to(predicts.device)
        with record_routing(model) as log, gates(self.modules, self.policy.bias, threshold) as gated:
            logits = model(**plain, use_cache=False).logits[predicts].float()
        routed = log_softmax(logits, dim=-1)
        if dense is None:
            losses = -routed.gather(1, inputs["labels"].roll(-1, dims=1)[predicts][:, None])[:, 0]
        else:
            losses = kl_div(routed, dense, reduction="none", log_target=True).sum(-1)
        share = 1 - sum(self.saved) * (1 - budget)
        weight = torch.exp(-_GROWTH / 2 * (1 - share)).to(routed.device)[predicts.nonzero()[:, 0]]
        surprise = (weight.sqrt() * routed.gather(1, drawn(routed.detach().exp()))[:, 0]).sum()
        gated = {name: gated[name] for name in self.modules}
        slopes = torch.autograd.grad(surprise, [gate.leaf for gate in gated.values()], retain_graph=True)
        for gate in gated.values():
            gate.decided = gate.where(matters)
        counted = num_items_in_batch is not None
        tokens = num_items_in_batch if counted else predicts.sum().clamp(min=1)
        factor = (self.accelerator.num_processes if counted else 1) / float(tokens)
        self._micro_batch = MicroBatch(
            gated,
            {name: gate.gradient(slope) for (name, gate), slope in zip(gated.items(), slopes, strict=True)},
            factor if counted else factor / self.current_gradient_accumulation_steps,
            budget,
            threshold,
            predicts.sum(1).clamp(min=1),
        )
        self.note_losses(log, losses.sum() * factor, capacity_penalty(model), inputs, counted)
        loss = (weight * losses).sum() * factor
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """One micro-batch; its backward pass has brought what the routers learn from."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._learn(self._micro_batch)
        del self._micro_batch
        if self.accelerator.sync_gradients:  # the last of a step
            self._apply()
        return loss

    @torch.no_grad()
    def _dense(self, model: nn.Module, plain: dict[str, Any], predicts: Tensor) -> Tensor:
        """Log-probabilities of the model in which everything runs."""
        self.model.eval()
        with gates(self.modules, self.policy.bias, None):
            logits = model(**plain, use_cache=False).logits[predicts].float()
        self.model.train()
        return log_softmax(logits, dim=-1)

    # ---- what routers learn

    @torch.no_grad()
    def _learn(self, batch: MicroBatch) -> None:
        """Collect the step that this micro-batch asks of every router."""
        bins = self.policy.bins(batch.budget)
        rows = bins.bincount(minlength=BINS)
        costs = {name: self._damage(batch, name, saved) for name, saved in zip(self.modules, self.saved, strict=True)}
        ratio = torch.zeros_like(self.policy.ratio)
        for name, gate in batch.gates.items():
            pair = torch.stack([costs[name].clamp(-20 * _CLIP, 20 * _CLIP), gate.score.exp()])
            by_row = (pair * gate.decided).sum(-1).view(2, len(bins), -1).sum(-1)
            ratio.index_add_(0, bins, by_row.T.double().cpu())
        sums = self.policy.ratio_with(ratio, rows)
        common = (sums[:, 0].clamp(min=0.05 * sums[:, 1]) / sums[:, 1])[bins].float()
        found = {"ratio": ratio, "rows": rows}
        kept = {}
        for name, gate in batch.gates.items():
            expected, least = gate.score.exp(), gate.by_row(batch.threshold.exp())
            excess = (costs[name] / gate.by_row(common) - expected) / (expected + least)
            found |= {f"{name} step": self._step(name, gate, excess), f"{name} count": gate.decided.sum()}
            some = gate.decided.any(1).nonzero()[:, 0]
            some = some[:: max(1, -(-len(some) // _KEPT))]
            kept[name] = (gate.score[some], gate.hidden[some], gate.decided[some])
        for name, value in found.items():
            self._pending[name] = self._pending.get(name, 0) + value.double().cpu()
        self._kept.append(kept)

    def _damage(self, batch: MicroBatch, name: str, saved: float) -> Tensor:
        """What skipping costs per operation that it saves, ``[n, E]``."""
        gate = batch.gates[name]
        gradient = gate.gradient(gate.leaf.grad) / batch.factor
        ran = (gate.score >= gate.by_row(batch.threshold)).float()
        damage = -gradient + (ran - 0.5) * batch.slopes[name].square()
        if self.modules[name].mod_level == "sequence":
            damage = damage / gate.by_row(batch.predictions)
        of_a_token = gate.decided.sum() / gate.decided.any(1).sum().clamp(min=1)  # several, where experts decide
        return damage * of_a_token / saved

    def _step(self, name: str, gate: Gate, excess: Tensor) -> Tensor:
        """Sums over the decisions of the steps of weights ``[E, d]`` and bias, ``[E, d + 1]``."""
        (mean, factor), decided = self.metric[name], gate.decided
        excess = excess.clamp(-_CLIP, _CLIP) * decided
        count = decided.sum().clamp(min=1)
        middle = excess.sum() / count if self.modules[name].mod_part != "expert" else 0.0
        towards = ((excess - middle) * decided).T @ (gate.hidden.float() - mean)
        weight = torch.cholesky_solve(towards.T, factor).T
        bias = middle * count - weight @ mean
        return torch.cat([weight, bias[:, None]], 1)

    @torch.no_grad()
    def _apply(self) -> None:
        """Take the step that the micro-batches of all processes ask for; thresholds follow where it moves scores."""
        sums, self._pending = summed(self._pending, self.args.device), {}
        kept, self._kept = self._kept, []
        policy = self.policy
        for name, module in self.modules.items():
            count = float(sums[f"{name} count"])
            rate = 1 / max(self.prior[name] + policy.seen[name] / 2, 2 * count)
            step = rate * sums[f"{name} step"].float()
            policy.seen[name] += count
            weight = router_of(module).weight
            weight.add_(placed(step[:, :-1], weight))
            if module.mod_part != "expert":
                policy.bias[name] += float(step[0, -1])
            for part in kept:
                score, hidden, _ = part[name]
                moved = step.to(score.device)
                score += hidden.float() @ moved[:, :-1].T + (moved[0, -1] if module.mod_part != "expert" else 0)
        found = {"curve": torch.zeros_like(policy.grid).double(), "parts": torch.zeros(1).double()}
        for part in kept:
            scores = [score[decided] for score, _, decided in part.values()]
            if all(len(score) for score in scores):
                found["parts"] += 1
                found["curve"] += curve_of(scores, self.saved, policy.grid)
        found = summed(found, self.args.device)
        if found["parts"]:
            policy.follow(found["curve"] / found["parts"])
        policy.ratio = policy.ratio_with(sums["ratio"], sums["rows"])

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        self.state.stateful_callbacks["budgets"] = self.policy.state()
        super()._save_checkpoint(model, trial)

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        self.policy.restore(self.state.stateful_callbacks["budgets"])


def _path_rate(matrix: Tensor, learning_rate: float) -> float:
    """How far an element of a skip path's ``matrix`` moves per step: ``learning_rate`` is a share of its rms."""
    return learning_rate * max(float(matrix.detach().square().mean().sqrt()), 1e-4)
