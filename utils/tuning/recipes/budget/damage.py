"""What skipping a module would do to the model's predictions, for every decision and all modules in one backward pass.

With ``x ← x + P(h) + m·(F(h) − P(h))`` at ``m = 1`` and targets ``y`` drawn from the model's own predictions, the mean
of ``(∂ log p(y) / ∂m)²`` is Fisher's information about ``m``, and half of it the divergence of the predictions at
``m = 0`` from the dense ones, to second order. The order ends where the model is sure of its answer, and at modules on
which everything rests, such as the first MLP of a language model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.model import routed_modules
from router_tuning.tuning.recipes.budget.gates import gates, predicting

_INPUTS = ("input_ids", "attention_mask", "prompt_length")
_DRAWS = 4  # of targets for the damage of a sequence, since there are few


class Damage(NamedTuple):
    """What a router sees, ``hidden [n, d]`` in the model's type, and the ``damage [n, E]`` of skipping, in float32.

    Both on the CPU; ``decided [n, E]`` says which damages are of decisions that the router has.
    """

    hidden: Tensor
    damage: Tensor
    decided: Tensor

    def mean(self) -> float:
        """Nats per decision."""
        return float(self.damage[self.decided].mean())


def fisher_damage(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    names: Collection[str] | None = None,
    seed: int = 0,
) -> dict[str, Damage]:
    """What routers see, and an unbiased estimate in nats of what skipping would do there.

    At token level it is the harm to the token's own prediction and to all behind it, at sequence level the mean harm
    to the sequence's predictions, of those that carry loss. Left out are padding, tokens behind the last such
    prediction and, where there is a skip path, first tokens, which no router decides on. A forward and a backward pass
    per batch (four at sequence level); beside these ``2·d`` bytes (in bf16) are kept per decision and router.

    Args:
        model: routed; its routers and thresholds do not matter and stay as they are.
        batches: ``input_ids``, ``attention_mask`` and ``labels`` as for a language model (-100: the token carries no
            loss), right-padded. Activations and logits of one must fit in memory.
        names: the routers to estimate for, ``"<layer>.<part>"``; None: all.
        seed: of the drawn targets.
    """
    modules = routed_modules(model)
    found: dict[str, list[Damage]] = {name: [] for name in (modules if names is None else names)}
    draws = _DRAWS if all(modules[name].mod_level == "sequence" for name in found) else 1
    training, generator = model.training, torch.Generator(model.device).manual_seed(seed)
    model.eval()
    try:
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in _INPUTS if key in batch}
            predicts, matters = predicting(batch["labels"].to(model.device))
            with torch.enable_grad(), gates(modules, dict.fromkeys(modules, 0.0), None) as gated:
                logits = model(**inputs, use_cache=False).logits
            seen = [gated[name] for name in found]
            damages = [torch.zeros_like(gate.score) for gate in seen]
            for draw in range(draws):
                towards = _drawn_gradient(logits.detach(), predicts, generator)
                leaves = [gate.leaf for gate in seen]
                slopes = torch.autograd.grad(logits, leaves, towards, retain_graph=draw < draws - 1)
                for gate, damage, slope in zip(seen, damages, slopes, strict=True):
                    damage += 0.5 / draws * gate.gradient(slope).square()
            for (name, kept), gate, damage in zip(found.items(), seen, damages, strict=True):
                if modules[name].mod_level == "sequence":
                    damage /= gate.by_row(predicts.sum(1).clamp(min=1))
                decided = gate.where(matters)
                some = decided.any(1)
                kept.append(Damage(gate.hidden[some].cpu(), damage[some].cpu(), decided[some].cpu()))
    finally:
        model.train(training)
    return {name: Damage(*map(torch.cat, zip(*kept, strict=True))) for name, kept in found.items()}


def drawn(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index of each row of ``chances [n, V]`` by its probability, ``[n, 1]``.

    ``torch.multinomial`` draws a number for each of the ``V``, a tenth of a training step on a CPU.
    """
    total = chances.cumsum(-1)
    number = torch.rand(len(total), 1, generator=generator, device=total.device) * total[:, -1:]
    return torch.searchsorted(total, number, right=True).clamp(max=total.shape[-1] - 1)


def damage_in_parts(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], names: Sequence[str], seed: int, at_once: int
) -> Iterator[tuple[str, Damage]]:
    """Name and damage of every router as :func:`fisher_damage` has them, in as many passes as memory asks for.

    Args:
        at_once: bytes; routers whose inputs fit here together are estimated in one pass over the tokens.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    together = max(1, at_once // (tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize))
    for start in range(0, len(names), together):
        yield from fisher_damage(model, batches, names[start : start + together], seed).items()


@torch.no_grad()
def _drawn_gradient(logits: Tensor, predicts: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of ``Σ log p(y)`` over some positions with respect to ``logits [b, t, V]``, ``y`` drawn from ``p``."""
    chances = logits[predicts].float().softmax(-1)
    targets = drawn(chances, generator)
    gradient = torch.zeros_like(logits)
    one = torch.ones_like(targets, dtype=torch.float32)
    gradient[predicts] = chances.neg_().scatter_add_(1, targets, one).to(gradient.dtype)
    return gradient
