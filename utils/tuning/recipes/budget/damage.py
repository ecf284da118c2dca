"""What skipping a module would do to the model's predictions, for every token and all modules in one backward pass.

With ``x ← x + P(h) + m·(F(h) − P(h))`` at ``m = 1`` and targets ``y`` drawn from the model's own predictions, the mean
of ``(∂ log p(y) / ∂m)²`` is Fisher's information about ``m``, and half of it the divergence of the predictions at
``m = 0`` from the dense ones, to second order. The order ends where the model is sure of its answer, and at modules on
which everything rests, such as the first MLP of a language model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from router_tuning.model import routed_modules
from router_tuning.model.context import current_context
from router_tuning.model.routed import Routed

_SLOPE = 0.25  # of the score σ(z) at z = 0, through which the engine hands on the gradient of m


def fisher_damage(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    names: Collection[str] | None = None,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What token-level routers see, and an unbiased estimate in nats of what skipping each token there would do.

    Each ``d`` is the harm to the token's own prediction and to all behind it, of those predictions that carry loss.
    Left out are padding, tokens behind the last such prediction and, where there is a skip path, first tokens, which
    no router decides on. One forward and one backward pass per batch; beside these ``2·d`` bytes (in bf16) are kept
    per token and router.

    Args:
        model: routed, at token level; its routers and thresholds do not matter and stay as they are.
        batches: ``input_ids``, ``attention_mask`` and ``labels`` as for a language model (-100: the token carries no
            loss), right-padded. Activations and logits of one must fit in memory.
        names: the routers to estimate for, ``"<layer>.<part>"``; None: all.
        seed: of the drawn targets.

    Returns:
        By router ``h [n, d]``, in the model's type on the CPU, and ``d [n]`` in float32, tokens in the same order.
    """
    modules = routed_modules(model)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (modules if names is None else names)}
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    handles = [m.mod_router.register_forward_hook(_leaf(name, m, seen)) for name, m in modules.items()]
    before = {name: module.mod_logit for name, module in modules.items()}
    training, generator = model.training, torch.Generator(model.device).manual_seed(seed)
    model.eval()
    try:
        for module in modules.values():
            module.mod_logit = -float("inf")
        for batch in batches:
            inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            predicts = (batch["labels"].roll(-1, dims=1) != -100).to(model.device)
            predicts[:, -1] = False
            matters = predicts.flip(1).cummax(1).values.flip(1)
            with torch.enable_grad():
                logits = model(**inputs, use_cache=False).logits
            towards = _drawn_gradient(logits.detach(), predicts, generator)
            gradients = torch.autograd.grad(logits, [seen[name][1] for name in found], towards)
            for (name, kept), gradient in zip(found.items(), gradients, strict=True):
                hidden, _, decided = seen[name]
                chosen = decided & matters.to(decided.device)
                damage = 0.5 * (gradient[..., 0][chosen] / _SLOPE).square()
                kept.append((hidden[chosen].cpu(), damage.cpu()))
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.mod_logit = before[name]
        model.train(training)
    return {name: (torch.cat([h for h, _ in kept]), torch.cat([d for _, d in kept])) for name, kept in found.items()}


def drawn(chances: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index of each row of ``chances [n, V]`` by its probability, ``[n, 1]``.

    ``torch.multinomial`` draws a number for each of the ``V``, a tenth of a training step on a CPU.
    """
    total = chances.cumsum(-1)
    number = torch.rand(len(total), 1, generator=generator, device=total.device) * total[:, -1:]
    return torch.searchsorted(total, number, right=True).clamp(max=total.shape[-1] - 1)


def damage_in_parts(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]], names: Sequence[str], seed: int, at_once: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, ``h`` and ``d`` of every router as :func:`fisher_damage` has them, in as many passes as memory asks for.

    Args:
        at_once: bytes; routers whose inputs fit here together are estimated in one pass over the tokens.
    """
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    together = max(1, at_once // (tokens * model.config.get_text_config().hidden_size * model.dtype.itemsize))
    for start in range(0, len(names), together):
        for name, (hidden, damage) in fisher_damage(model, batches, names[start : start + together], seed).items():
            yield name, hidden, damage


def _leaf(name: str, module: Routed, seen: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A hook that puts a score without a past in place of a router's: all that its gradient says is about ``m``."""

    def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        leaf, context = torch.zeros_like(output).requires_grad_(), current_context()
        chosen = torch.ones_like(output[..., 0], dtype=torch.bool) if context.real is None else context.real
        first = module.mod_first(context)
        chosen = chosen if first is None else chosen & ~first
        seen[name] = args[0].detach(), leaf, chosen.to(leaf.device)
        return leaf

    return hook


@torch.no_grad()
def _drawn_gradient(logits: Tensor, predicts: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of ``Σ log p(y)`` over some positions with respect to ``logits [b, t, V]``, ``y`` drawn from ``p``."""
    chances = logits[predicts].float().softmax(-1)
    targets = drawn(chances, generator)
    gradient = torch.zeros_like(logits)
    one = torch.ones_like(targets, dtype=torch.float32)
    gradient[predicts] = chances.neg_().scatter_add_(1, targets, one).to(gradient.dtype)
    return gradient
