"""How close a model stays to its dense self on texts: divergence, agreement and likelihood, document by document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from router_tuning.errors import UserError
from router_tuning.evaluation.documents import Document
from router_tuning.model import flops_share, is_routed, record_routing, routed_modules
from router_tuning.model.recording import RoutingLog
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import learns

Batch = dict[str, Tensor]
_LOGITS = 2**26
"""At most so many logits at once: 256 MB in float32."""


def batches_of(documents: Sequence[Document], collate: Collator, vocabulary: int) -> Iterator[tuple[list[int], Batch]]:
    """Right-padded batches of documents of like lengths, with the numbers of the documents in each.

    Raises:
        UserError: where no document has anything to predict.
    """
    if not any(learns(document["labels"]) for document in documents):
        raise UserError(f"none of {len(documents)} documents has anything to predict: rows with answers are needed")
    order = sorted(range(len(documents)), key=lambda number: len(documents[number]["input_ids"]))
    group: list[int] = []
    for number in order:
        if group and (len(group) + 1) * len(documents[number]["input_ids"]) * vocabulary > _LOGITS:
            yield group, collate([documents[member] for member in group])
            group = []
        group.append(number)
    if group:
        yield group, collate([documents[member] for member in group])


@torch.no_grad()
def predictions(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Log-probabilities of every labelled token's vocabulary, float32 ``[n, V]``, row by row."""
    names = ["input_ids", "attention_mask", *(["prompt_length"] if is_routed(model) else [])]
    inputs = {name: batch[name].to(model.device) for name in names}
    chosen = batch["labels"][:, 1:] != -100
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return log_softmax(logits[chosen.to(logits.device)].float(), dim=-1)


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each prediction from the dense one in nats, ``[n]``."""
    return (dense.exp() * (dense - other)).sum(-1)


def compare_texts(
    dense: PreTrainedModel, model: PreTrainedModel, documents: Sequence[Document], collate: Collator
) -> dict[str, Any]:
    """Score ``model`` beside ``dense`` on documents.

    Returns ``kl`` (nats per predicted token), ``agreement`` (share of tokens of which both think the same most
    likely), ``perplexity``, ``dense_perplexity``, ``tokens``; of a routed model ``capacity`` by module and the
    ``share`` of the decoder's operations that this leaves; and of each document in ``documents`` its ``tokens`` and
    sums of ``kl``, ``nll`` and ``agree``.
    """
    sums = {name: [0.0] * len(documents) for name in ("tokens", "kl", "nll", "dense_nll", "agree")}
    with record_routing(model) if is_routed(model) else nullcontext() as log:
        for numbers, batch in batches_of(documents, collate, vocabulary(model)):
            reference, found = predictions(dense, batch), predictions(model, batch)
            chosen = batch["labels"][:, 1:] != -100
            target = batch["labels"][:, 1:][chosen].to(found.device)[:, None]
            values = {
                "tokens": torch.ones_like(target[:, 0]),
                "kl": divergence(reference, found),
                "nll": -found.gather(1, target)[:, 0],
                "dense_nll": -reference.gather(1, target)[:, 0],
                "agree": found.argmax(-1) == reference.argmax(-1),
            }
            for name, value in values.items():
                parts = value.double().cpu().split(chosen.sum(1).tolist())
                for number, part in zip(numbers, parts, strict=True):
                    sums[name][number] = float(part.sum())
    total = {name: math.fsum(value) for name, value in sums.items()}
    tokens = total["tokens"]
    return {
        "tokens": int(tokens),
        "kl": total["kl"] / tokens,
        "agreement": total["agree"] / tokens,
        "perplexity": math.exp(total["nll"] / tokens),
        "dense_perplexity": math.exp(total["dense_nll"] / tokens),
        **(executed(model, log) if log is not None else {}),
        "documents": {name: [_short(v) for v in sums[name]] for name in ("tokens", "kl", "nll", "agree")},
    }


def executed(model: PreTrainedModel, log: RoutingLog) -> dict[str, Any]:
    """What ran in recorded passes: ``capacity`` by module, and the ``share`` of the decoder's operations."""
    names = {module.mod_key: name for name, module in routed_modules(model).items()}
    capacity = {names[key]: float(value) for key, value in log.capacity_tensors().items()}
    return {
        "share": flops_share(model, capacity),
        "capacity": {name: round(value, 4) for name, value in capacity.items()},
    }


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that a model tells apart."""
    return model.config.get_text_config().vocab_size


def answer_loss(model: PreTrainedModel, documents: Sequence[Document], collate: Collator) -> float:
    """Mean cross-entropy in nats of the labelled tokens of documents."""
    total, count = 0.0, 0
    for _, batch in batches_of(documents, collate, vocabulary(model)):
        found, target = predictions(model, batch), batch["labels"][:, 1:]
        target = target[target != -100].to(found.device)
        total -= float(found.gather(1, target[:, None]).sum())
        count += len(target)
    return total / count


def _short(value: float) -> float | int:
    return int(value) if value == int(value) else float(f"{value:.5g}")
