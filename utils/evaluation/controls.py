"""What a router has to beat at equal operations: random decisions, and modules removed for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from router_tuning.evaluation.documents import Document
from router_tuning.evaluation.texts import batches_of, divergence, predictions, vocabulary
from router_tuning.model import force_routing, routed_modules
from router_tuning.model.flops import saved_shares
from router_tuning.tuning.batching import Collator


class Removed(NamedTuple):
    """One more module removed: its ``name``, and with all before it the divergence ``kl`` and the ``share`` left."""

    name: str
    kl: float
    share: float


def random_masks(model: PreTrainedModel, rates: Mapping[str, float], seed: int) -> AbstractContextManager:
    """Context in which every decision (per input, or per token) of a module is drawn: run with its rate."""
    generator = torch.Generator().manual_seed(seed)
    names = _names(model)

    def draw(layer: int, part: str, shape: torch.Size, past: int) -> Tensor:
        return torch.rand(shape, generator=generator) < rates[names[layer, part]]

    return force_routing(model, draw)


def removed(model: PreTrainedModel, order: Sequence[Removed], share: float) -> AbstractContextManager:
    """Context without the first modules of ``order``, so that ``share`` of the decoder's operations is left.

    Each removed module leaves a step; of the last one needed only as many inputs, drawn at random, go without it that
    the mean over inputs is ``share``. All others always run.

    Raises:
        ValueError: if the whole order leaves more.
    """
    if share >= 1:
        return force_routing(model, True)
    count = next((number for number, step in enumerate(order) if step.share <= share), None)
    if count is None:
        raise ValueError(f"removing all {len(order)} modules leaves more than {share} of the decoder's operations")
    before = order[count - 1].share if count else 1.0
    rate = (before - share) / (before - order[count].share)
    gone, last = {step.name for step in order[:count]}, order[count].name
    generator, names = torch.Generator().manual_seed(0), _names(model)

    def decide(layer: int, part: str, shape: torch.Size, past: int) -> bool | Tensor:
        name = names[layer, part]
        return torch.rand(shape, generator=generator) >= rate if name == last else name not in gone

    return force_routing(model, decide)


@torch.no_grad()
def removal_order(
    dense: PreTrainedModel,
    model: PreTrainedModel,
    documents: Sequence[Document],
    collate: Collator,
    share: float = 0.0,
    candidates: int = 4,
) -> list[Removed]:
    """Modules in the order in which they are removed, each time the one with the least divergence per operation saved.

    After one look at each module alone, a step looks again at those few that were cheapest when last looked at.

    Args:
        dense: what is to be kept to. model: routed, with the skip paths that stand in for removed modules.
        share: where to stop, as soon as no more of the decoder's operations is left. candidates: looked at per step.
    """
    batches = [batch for _, batch in batches_of(documents, collate, vocabulary(model))]
    references = [predictions(dense, batch).half() for batch in batches]
    tokens = sum(map(len, references))
    names, saved = _names(model), saved_shares(model)

    def without(gone: Sequence[str]) -> float:
        total = 0.0
        with force_routing(model, lambda layer, part, shape, past: names[layer, part] not in gone):
            for batch, reference in zip(batches, references, strict=True):
                total += float(divergence(reference.float(), predictions(model, batch)).sum())
        return total / tokens

    def worth(name: str) -> float:
        return harm[name] / saved[name]

    harm = {name: without([name]) for name in tqdm(saved, desc="removal, one at a time", leave=False)}
    order: list[Removed] = []
    kl, left = 0.0, 1.0
    with tqdm(desc="removal, in order", leave=False) as progress:
        while left > share and harm:
            if order:
                cheapest = sorted(harm, key=worth)[:candidates]
                harm |= {name: without([*(step.name for step in order), name]) - kl for name in cheapest}
            name = min(cheapest if order else harm, key=worth)
            kl, left = kl + harm.pop(name), left - saved[name]
            order.append(Removed(name, kl, left))
            progress.update()
    return order


def _names(model: PreTrainedModel) -> dict[tuple[int, str], str]:
    return {(module.mod_layer, module.mod_part): name for name, module in routed_modules(model).items()}
