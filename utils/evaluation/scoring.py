"""One policy on one benchmark: a record, which is all that tables and figures are made from."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.evaluation.cost import measure_cost
from router_tuning.evaluation.documents import Document
from router_tuning.evaluation.tasks import evaluate
from router_tuning.evaluation.texts import compare_texts
from router_tuning.model import is_routed
from router_tuning.provenance import provenance
from router_tuning.tuning.batching import Collator

Record = dict[str, Any]
Under = Callable[[str], AbstractContextManager]
"""Given the name of a task or text, a context in which it is scored, such as imposed decisions."""


@dataclass(frozen=True)
class Benchmark:
    """What policies are scored on.

    Attributes:
        tasks: lm-eval tasks or groups. evaluation: options of :func:`~router_tuning.evaluation.tasks.evaluate`.
        texts: documents by name.
        prompts: left-padded prompts for times and cache. timing: options of ``measure_cost``.
    """

    tasks: Sequence[str] = ()
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, Sequence[Document]] = field(default_factory=dict)
    prompts: Sequence[dict[str, Tensor]] = ()
    timing: Mapping[str, Any] = field(default_factory=dict)


def score(
    benchmark: Benchmark,
    dense: PreTrainedModel,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cell: Mapping[str, Any],
    under: Under | None = None,
    timed: bool = True,
) -> Record | None:
    """The record of a model, or of decisions imposed on it: None on ranks other than 0.

    Args:
        dense: what the model is to keep to. cell: what tells the policy from others: ``policy``, ``recipe``,
            ``granularity``, ``budget``, ``seed``. timed: whether to measure times where there are prompts.

    Returns:
        JSON-ready. ``cell``; ``tasks`` and ``groups`` of ``evaluate``; ``texts``, ``compare_texts`` by name; ``cost``
        of ``measure_cost``; ``share``, the mean over tasks and texts of the decoder's operations that were left, and
        ``capacity``, of the modules that ran; ``model`` and ``provenance``.
    """
    under = under or (lambda name: nullcontext())
    record: Record = {"cell": dict(cell), "share": 1.0, "capacity": 1.0}
    if benchmark.tasks:
        found = evaluate(model, tokenizer, benchmark.tasks, under=under, **benchmark.evaluation)
        if found is None:
            return None
        record |= found
    collate, texts = Collator(tokenizer), {}
    for name, documents in benchmark.texts.items():
        with under(name):
            texts[name] = compare_texts(dense, model.eval(), documents, collate)
    if texts:
        record["texts"] = texts
    routed = is_routed(model)
    if benchmark.prompts and timed and routed:
        record["cost"] = measure_cost(dense, model, benchmark.prompts, under=under("prompts"), **benchmark.timing)
    parts = [*record.get("tasks", {}).values(), *texts.values()] or [record.get("cost", {})]
    if routed:
        record["share"] = statistics.fmean(part["share"] for part in parts)
        record["capacity"] = statistics.fmean(statistics.fmean(part["capacity"].values()) for part in parts)
    fields = {name: value for name, value in model.config.to_dict().items() if name.startswith("mod_")}
    about = {"class": type(model).__name__, "dtype": str(model.dtype), "routing": fields if routed else None}
    return record | {"model": about, "provenance": provenance()}


def scored_parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What ran and was left of every task and text of a record, and of the timed ``prompts``."""
    timed = {"prompts": record["cost"]} if "cost" in record else {}
    return {**record.get("tasks", {}), **record.get("texts", {}), **timed}
