"""Dense, tuned and the best static drop of the same capacity, side by side: scores, capacity, cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.evaluation.cost import measure_cost
from router_tuning.evaluation.harness import evaluate
from router_tuning.evaluation.static_drop import StaticDrop, best_static
from router_tuning.model import ModConfig, force_routing
from router_tuning.model.flops import count_flops

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Plan:
    """What to compare on.

    Attributes:
        tasks: lm-eval tasks or groups.
        prompts: left-padded prompt batches for capacity, FLOPs, time and cache.
        search: labelled batches on which the static mask is searched; never the rows that are scored.
        limit: documents per task, None for all.
        batch_size: of the harness.
        new_tokens, repeats: of the time measurement.
        curve: score the best static mask of every size, not of the tuned capacity alone.
        metadata: passed to the tasks.
    """

    tasks: Sequence[str]
    prompts: Sequence[Batch]
    search: Sequence[Batch]
    limit: int | None = None
    batch_size: int | str = 32
    new_tokens: int = 16
    repeats: int = 5
    curve: bool = False
    metadata: Mapping[str, Any] | None = None


def compare(
    dense: PreTrainedModel, tuned: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: Plan
) -> dict[str, Any]:
    """Measure everything and return a JSON-ready dict.

    ``systems`` lists ``{"name", "capacity", "flops_share", "kept" (static only), "evaluation"}`` for the dense base,
    the tuned model and static masks; ``cost`` is that of :func:`measure_cost`.
    """
    cost = measure_cost(dense, tuned, plan.prompts, new_tokens=plan.new_tokens, repeats=plan.repeats)
    capacity = cost["capacity"]["total"]
    progress = tqdm(desc="systems scored", total=2, unit="system")
    systems = [_system("dense", 1.0, 1.0, _score(dense, tokenizer, plan))]
    progress.update()
    systems.append(_system("tuned", capacity, cost["flops_share"], _score(tuned, tokenizer, plan)))
    progress.update()
    masks = [
        best_static(tuned, _routed_layers(tuned), k, plan.search) for k in static_sizes(tuned, capacity, plan.curve)
    ]
    progress.total += len(masks)
    progress.refresh()
    for mask in masks:
        scores = _score(tuned, tokenizer, plan, force_routing(tuned, mask.mask()))
        share = _static_flops(tuned, mask, plan.prompts) / cost["flops_dense"]
        entry = _system(static_name(mask), mask.capacity, share, scores)
        systems.append(entry | {"kept": list(mask.kept), "search_loss": mask.loss, "search_method": mask.method})
        progress.update()
    progress.close()
    settings = {key: value for key, value in asdict(plan).items() if key not in ("prompts", "search")}
    return {"systems": systems, "cost": cost, "plan": settings}


def static_sizes(model: PreTrainedModel, capacity: float, curve: bool) -> list[int]:
    """How many routed layers the static masks keep: the two whole numbers around the capacity, or every size."""
    layers = len(_routed_layers(model))
    if curve:
        return list(range(layers))
    return sorted({math.floor(capacity * layers + 1e-6), math.ceil(capacity * layers - 1e-6)})


def static_name(mask: StaticDrop) -> str:
    """Name of a static system in tables."""
    return f"static {len(mask.kept)}/{len(mask.layers)}"


def _routed_layers(model: PreTrainedModel) -> list[int]:
    return ModConfig.read_from(model.config).layers


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    under: AbstractContextManager | None = None,
) -> dict[str, Any]:
    found = evaluate(
        model,
        tokenizer,
        plan.tasks,
        batch_size=plan.batch_size,
        limit=plan.limit,
        metadata=plan.metadata,
        under=under,
    )
    if found is None:
        raise RuntimeError("a comparison runs in one process; score single models in parallel with evaluate_mod.py")
    return found


def _system(name: str, capacity: float, flops_share: float, evaluation: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "capacity": capacity, "flops_share": flops_share, "evaluation": evaluation}


def _static_flops(model: PreTrainedModel, mask: StaticDrop, prompts: Sequence[Batch]) -> int:
    with force_routing(model, mask.mask()):
        return sum(count_flops(model, batch) for batch in prompts)
