"""Token-level routers fitted to what skipping costs under their own policy, while skip paths learn.

The closed form (:mod:`closed_form`) knows what skipping one module for one token does where everything else runs. Here
the same is asked where the others are skipped as the routers have it, at many budgets. With ``L`` the divergence from
the dense model's predictions, ``g = ∂L/∂m`` of a module's gate and ``s`` that of ``log q(y)`` for ``y`` drawn from the
routed model's predictions, ``L(skipped) − L(run) = −g ± s²/2`` to second order, plus where the module ran and minus
where it was skipped: at the dense model ``g`` is zero, and what remains is Fisher's damage. A score ``z = W·h + b``
predicts the logarithm of that per operation saved, so one regression step per batch moves it, in the metric of what
the router sees: no learning rate, and no gradient through a hard decision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import log_softmax
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from router_tuning.model import capacity_penalty, record_routing, routed_modules
from router_tuning.tuning.customized_trainer import RouterTrainer
from router_tuning.tuning.recipes.budget.damage import drawn
from router_tuning.tuning.recipes.budget.gates import SLOPE, Gates, Seen, gates
from router_tuning.tuning.recipes.budget.settings import BudgetArguments, path_rate

_CLIP = 40.0
_PRIOR = 3000.0  # tokens that the start counts for
_GROWTH = 19.0  # divergence grows like exp(19·(share of operations saved))
_BINS = 5
_KEPT = 128  # tokens of a micro-batch on whose scores thresholds are read off anew after a step


class Policy(TrainerCallback, ExportableState):
    """Biases of the routers and what holds their budgets, common to all processes, kept in checkpoints.

    Attributes:
        bias: by router. curve: the threshold of each budget of ``grid``.
        ratio: ``[bins, 2]``, running sums of damage and of what scores predict, by budget. seen: tokens learnt from.
    """

    def __init__(self, bias: Mapping[str, float], lowest: float) -> None:
        self.bias, self.lowest = dict(bias), lowest
        self.grid = torch.linspace(max(0.02, lowest - 0.2), 0.99, 50)
        self.curve: Tensor
        self.ratio = torch.full((_BINS, 2), 1e-9, dtype=torch.float64)
        self.seen = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        kept = {"bias": self.bias, "curve": self.curve.tolist(), "ratio": self.ratio.tolist(), "seen": self.seen}
        return {"args": {"bias": self.bias, "lowest": self.lowest}, "attributes": kept}

    def load(self, attributes: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""
        self.bias, self.seen = dict(attributes["bias"]), attributes["seen"]
        self.curve = torch.tensor(attributes["curve"])
        self.ratio = torch.tensor(attributes["ratio"], dtype=torch.float64)


class RegressionTrainer(RouterTrainer):
    """Fits routers by regression at drawn budgets; the optimizer steps skip paths towards the dense predictions.

    Args:
        recipe: its settings. saved: share of the decoder's operations that skipping saves, by router.
        inputs: what routers see, by router. bias: to start from. scores: ``W·h + b`` of some tokens, ``[R, n]``.
    """

    def __init__(
        self,
        *args,
        recipe: BudgetArguments,
        saved: Mapping[str, float],
        inputs: Mapping[str, Seen],
        bias: Mapping[str, float],
        scores: Tensor,
        **kwargs,
    ) -> None:
        super().__init__(*args, gradient_scale=0.0, **kwargs)
        self.recipe, self.inputs = recipe, inputs
        self.modules = routed_modules(self.model)
        self.saved = torch.tensor([saved[name] for name in self.modules], device=self.args.device)
        self.policy = Policy(bias, recipe.lowest_budget)
        self.policy.curve = curve_of(scores, self.saved.cpu(), self.policy.grid)
        self.add_callback(self.policy)
        self.add_callback(_AfterStep(self._apply))
        self._pending: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, list[Tensor]]] = []  # scores and what routers saw, by micro-batch

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Of skip paths: each matrix moves by a share of its rms per step."""
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        paths = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        groups = [{"params": [path], "lr": path_rate(path, self.args.learning_rate)} for path in paths]
        routers = [module.mod_router.weight for module in self.modules.values()]  # of which none gets a gradient
        self.optimizer = kind(groups or routers, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Divergence from the dense model at a budget drawn for each row; low ones, which diverge more, weigh less."""
        if self.deepspeed_engine is not None:  # whose forward pass takes any gradient for the one that it steps by
            model = self.model
        plain = {key: value for key, value in inputs.items() if key != "labels"}
        predicts = inputs["labels"][:, 1:] != -100
        with torch.no_grad(), gates(self.modules, self.policy.bias, None) as dense_pass:
            self.model.eval()
            dense = log_softmax(model(**plain, use_cache=False).logits[:, :-1][predicts].float(), dim=-1)
            self.model.train()
        matters = torch.cat([predicts, torch.zeros_like(predicts[:, :1])], 1).flip(1).cummax(1).values.flip(1)
        decided = matters & dense_pass.decided
        budget = self._draw(len(predicts))
        share = 1 - float(self.saved.sum()) * (1 - budget)
        threshold = self._threshold(budget).to(predicts.device)
        with record_routing(model) as log, gates(self.modules, self.policy.bias, threshold) as routed_pass:
            logits = model(**plain, use_cache=False).logits[:, :-1][predicts].float()
        routed = log_softmax(logits, dim=-1)
        weight = torch.exp(-_GROWTH / 2 * (1 - share)).to(routed.device)[predicts.nonzero()[:, 0]]
        divergence = (dense.exp() * (dense - routed)).sum(-1)
        target = drawn(routed.detach().exp())
        leaves = routed_pass.leaves()
        surprise = (weight.sqrt() * routed.gather(1, target)[:, 0]).sum()
        slopes = torch.autograd.grad(surprise, leaves, retain_graph=True)
        counted = num_items_in_batch is not None
        tokens = num_items_in_batch if counted else predicts.sum().clamp(min=1)
        factor = (self.accelerator.num_processes if counted else 1) / float(tokens)
        self._micro_batch = {
            "gated": routed_pass,
            "slopes": torch.stack([slope[..., 0] for slope in slopes]) / SLOPE,
            "factor": factor if counted else factor / self.current_gradient_accumulation_steps,
            "decided": decided,
            "budget": budget,
            "threshold": threshold,
        }
        self.note_losses(log, divergence.sum() * factor, capacity_penalty(model), inputs, counted)
        loss = (weight * divergence).sum() * factor
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        """One micro-batch; its backward pass has brought what the routers learn from."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._learn(**self._micro_batch)
        del self._micro_batch
        return loss

    # ---- budgets

    def _draw(self, rows: int) -> Tensor:
        low, high = self.recipe.lowest_budget, self.recipe.highest_budget
        return low + (high - low) * (torch.rand(rows) + torch.randperm(rows)) / rows

    def _threshold(self, budget: Tensor) -> Tensor:
        return self.policy.curve[(budget[:, None] - self.policy.grid).abs().argmin(1)]

    # ---- what routers learn

    @torch.no_grad()
    def _learn(
        self, gated: Gates, slopes: Tensor, factor: float, decided: Tensor, budget: Tensor, threshold: Tensor
    ) -> None:
        """Collect the step that this micro-batch asks of every router."""
        scores = gated.scores()
        gradient = torch.stack([leaf.grad[..., 0] for leaf in gated.leaves()]) / (SLOPE * factor)
        ran = (scores >= threshold[:, None]).float()
        per_operation = (-gradient + (ran - 0.5) * slopes.square()) / self.saved[:, None, None]
        expected = scores.exp()
        low, high = self.recipe.lowest_budget, self.recipe.highest_budget
        bins = ((budget - low) / max(high - low, 1e-9) * _BINS).long().clamp(0, _BINS - 1)
        found = torch.zeros_like(self.policy.ratio)
        limited = per_operation.clamp(-20 * _CLIP, 20 * _CLIP) * decided
        for row, place in enumerate(bins.tolist()):
            found[place, 0] += float(limited[:, row].sum())
            found[place, 1] += float((expected[:, row] * decided[row]).sum())
        ratio = 0.95 ** bins.bincount(minlength=_BINS)[:, None] * self.policy.ratio + found
        common = (ratio[:, 0].clamp(min=0.05 * ratio[:, 1]) / ratio[:, 1])[bins].to(per_operation)
        least = threshold.exp()[:, None]
        residual = ((per_operation / common[:, None] - expected) / (expected + least)).clamp(-_CLIP, _CLIP)
        count = max(int(decided.sum()), 1)
        weights, biases = [], []
        for name, hidden, excess in zip(self.modules, gated.hidden(), residual, strict=True):
            mean, factor_of = self.inputs[name]
            excess, centred = excess[decided], hidden[decided].float() - mean
            middle = excess.mean()
            towards = (centred.T @ (excess - middle)) / count
            weights.append(torch.cholesky_solve(towards[:, None], factor_of)[:, 0])
            biases.append(middle - weights[-1] @ mean)
        found_here = {
            "weight": count * torch.stack(weights),
            "bias": count * torch.stack(biases),
            "ratio": found,
            "rows": bins.bincount(minlength=_BINS),
            "tokens": torch.tensor([count]),
        }
        for name, value in found_here.items():
            self._pending[name] = self._pending.get(name, 0) + value.double().cpu()
        places = decided.nonzero()[:: -(-count // _KEPT)].unbind(1)
        if len(places[0]):
            self._kept.append((scores[:, *places], [hidden[places] for hidden in gated.hidden()]))

    @torch.no_grad()
    def _apply(self) -> None:
        """Take the step that the micro-batches of all processes ask for; thresholds follow where it moves scores."""
        sums, self._pending = _summed(self._pending, self.args.device), {}
        kept, self._kept = self._kept, []
        policy, tokens = self.policy, float(sums["tokens"])
        rate = 1 / max(_PRIOR + policy.seen / 2, 2 * tokens)
        for place, (name, step) in enumerate(zip(self.modules, sums["weight"].float(), strict=True)):
            shift = float(sums["bias"][place])
            _add(self.modules[name].mod_router.weight, (rate * step)[None])
            policy.bias[name] += rate * shift
            for scores, hidden in kept:
                scores[place] += rate * (hidden[place].float() @ step.to(scores.device) + shift)
        policy.seen += tokens
        found = {"curve": torch.zeros_like(policy.grid).double(), "tokens": torch.zeros(1).double()}
        for scores, _ in kept:
            found["tokens"] += scores.shape[1]
            found["curve"] += scores.shape[1] * curve_of(scores, self.saved, policy.grid)
        found = _summed(found, self.args.device)
        if found["tokens"]:
            policy.curve = 0.8 * policy.curve + 0.2 * (found["curve"] / found["tokens"]).float()
        policy.ratio = 0.95 ** sums["rows"][:, None] * policy.ratio + sums["ratio"]

    def _restore(self, folder: Path) -> None:
        super()._restore(folder)
        states = json.loads((folder / TRAINER_STATE_NAME).read_text())["stateful_callbacks"]
        self.policy.load(states[Policy.__name__]["attributes"])


def _summed(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Sums over all processes, on the CPU."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return dict(values)
    packed = torch.cat([value.flatten() for value in values.values()]).to(device)
    dist.all_reduce(packed)
    parts = packed.cpu().split([value.numel() for value in values.values()])
    return {name: part.view_as(value) for part, (name, value) in zip(parts, values.items(), strict=True)}


def curve_of(scores: Tensor, saved: Tensor, grid: Tensor) -> Tensor:
    """Thresholds at which the shares of ``grid`` of the routed operations run, on the CPU.

    Args:
        scores: ``[R, n]``. saved: operations that skipping saves, ``[R]``.
    """
    values, order = scores.flatten().sort()
    weight = (saved / (saved.sum() * scores.shape[1]))[:, None].expand_as(scores).flatten()[order].cumsum(0)
    return values[torch.searchsorted(weight, (1 - grid).to(weight)).clamp(max=len(values) - 1)].cpu()


class _AfterStep(TrainerCallback):
    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """An optimizer step is complete."""
        self.then()


def _add(weight: Tensor, step: Tensor) -> None:
    step = step.to(weight.device)
    if isinstance(weight, DTensor):
        step = distribute_tensor(step, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.add_(step)
