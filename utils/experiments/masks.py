"""Fixed masks of an experiment: chosen on one set of rows, scored on another, and bounded by an oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.evaluation import controls
from router_tuning.evaluation.rows import labelled_batches
from router_tuning.experiments.oracle import allocation_oracle, static_curve
from router_tuning.model import routed_modules
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import encode_conversation
from router_tuning.tuning.recipes.budget.recipe import in_batches
from router_tuning.tuning.recipes.budget.search import Explored, explore

LENGTH = 512  # tokens; longer conversations are cut
Rows = Sequence[Mapping[str, Any]]


def every_mask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Explored:
    """All masks of a model routed at sequence level on conversations ``{"messages": [...]}``."""
    encoded = [encode_conversation(row["messages"], tokenizer, LENGTH) for row in rows]
    count = 2 ** len(routed_modules(model))
    return explore(model, in_batches(encoded, Collator(tokenizer), 8), count, with_features=False)


def static_masks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, method: str
) -> dict[int, list[tuple[int, str]]]:
    """Routers to keep at every size: by ``exhaustive`` or ``greedy`` search of the likelihood, or by ``cosine``.

    ``rows`` are the search split; ``cosine`` is the importance of LLM-Drop, which looks at no answer.
    """
    keys = controls.routers_of(model)
    if method == "exhaustive":
        found = every_mask(model, tokenizer, rows)
        curve = static_curve(found.exact.float().mean(0)[None], found.masks[0], found.likelihood.mean(0))
        return {size: [keys[r] for r in kept] for size, (kept, _) in enumerate(curve)}
    batches = labelled_batches(rows, tokenizer, 64, LENGTH)
    order = {"greedy": controls.greedy_order, "cosine": controls.cosine_order}[method](model, batches)
    return {size: [key for key in keys if key not in order[: len(keys) - size]] for size in range(len(keys) + 1)}


def mask_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    search: Rows,
    held_out: Mapping[str, Rows],
    budgets: Sequence[float],
) -> dict[str, Any]:
    """Whole-answer exact match of every mask by task, the static masks chosen on fresh rows, and the oracle."""
    searched = every_mask(model, tokenizer, search)
    table = torch.stack([every_mask(model, tokenizer, rows).exact.float().mean(0) for rows in held_out.values()])
    masks, likelihood = searched.masks[0], searched.likelihood.mean(0)
    fresh, same = static_curve(table, masks, likelihood), static_curve(table, masks, table.mean(0))
    return {
        "routers": list(routed_modules(model)),
        "tasks": list(held_out),
        "masks": masks.int().tolist(),
        "exact_match": [[round(v, 4) for v in row] for row in table.tolist()],
        "search_likelihood": likelihood.tolist(),
        "static_fresh": [{"kept": kept, "exact_match": score} for kept, score in fresh],
        "static_same_items": [{"kept": kept, "exact_match": score} for kept, score in same],
        "oracle": {f"{b:g}": allocation_oracle(table, masks, b) for b in budgets},
    }
