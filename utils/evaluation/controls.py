"""What a router has to beat at equal budget: fixed masks found in three ways, and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import PreTrainedModel

from router_tuning.evaluation.static_drop import Batch, answer_loss
from router_tuning.model import force_routing, routed_modules
from router_tuning.model.call import RouterKey
from router_tuning.model.routed import Routed
from router_tuning.model.seams import decoder_of


def routers_of(model: PreTrainedModel) -> list[tuple[int, str]]:
    """``(layer, part)`` of every router, in the order in which they run."""
    return [(module.mod_layer, module.mod_part) for module in routed_modules(model).values()]


def fixed(model: PreTrainedModel, kept: Sequence[tuple[int, str]]) -> AbstractContextManager:
    """Context in which exactly the routers ``kept`` run, for every input."""
    return force_routing(model, {key: key in set(kept) for key in routers_of(model)})


def random_masks(model: PreTrainedModel, capacity: float, seed: int) -> AbstractContextManager:
    """Context in which every decision (per input, or per token) is drawn: run with probability ``capacity``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(layer: int, part: str, shape: torch.Size, past: int) -> Tensor:
        return torch.rand(shape, generator=generator) < capacity

    return force_routing(model, draw)


def random_fixed(model: PreTrainedModel, count: int, seed: int) -> list[tuple[int, str]]:
    """``count`` routers drawn at random, to be kept for every input."""
    keys = routers_of(model)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return sorted(keys[index] for index in order)


def greedy_order(model: PreTrainedModel, batches: Sequence[Batch]) -> list[tuple[int, str]]:
    """Routers in the order in which they are dropped when each time the one is dropped whose loss costs least."""
    kept, dropped = routers_of(model), []
    for _ in tqdm(range(len(kept)), desc="greedy drop", leave=False):
        losses = {}
        for key in kept:
            with fixed(model, [other for other in kept if other != key]):
                losses[key] = answer_loss(model, batches)
        cheapest = min(losses, key=losses.__getitem__)
        kept.remove(cheapest)
        dropped.append(cheapest)
    return dropped


@torch.no_grad()
def cosine_order(model: PreTrainedModel, batches: Sequence[Batch]) -> list[tuple[int, str]]:
    """Routers by the importance of LLM-Drop, least important first: ``1 - cos(x, x + F(norm(x)))`` of the residual.

    He et al. 2024, "What Matters in Transformers? Not All Attention is Needed", section 3: one dense pass, mean over
    real tokens.
    """
    total: dict[tuple[int, str], float] = dict.fromkeys(routers_of(model), 0.0)
    handles, count = [], 0.0
    state: dict[str, Any] = {}
    for module in routed_modules(model).values():
        handles += _watch(module, model, state, total)
    try:
        for batch in batches:
            state["real"] = batch["attention_mask"].bool()
            count += float(state["real"].sum())
            with force_routing(model, True):
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(total, key=lambda key: total[key] / count)


def _watch(module: Routed, model: PreTrainedModel, state: dict[str, Any], total: dict[RouterKey, float]) -> list[Any]:
    """Hooks that add a module's importance: residual before (input of the norm in front) against after."""
    key = (module.mod_layer, module.mod_part)
    decoder_layer = decoder_of(model).layers[module.mod_layer]
    held: dict[str, Tensor] = {}

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        held["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def after(_: Any, args: tuple, output: Any) -> None:
        update = output[0] if isinstance(output, tuple) else output
        x = held["x"]
        y = update if module.mod_part == "block" else x + update
        change = 1 - cosine_similarity(x.float(), y.float(), dim=-1)
        total[key] += float(change[state["real"]].sum())

    source = decoder_layer if module.mod_part in ("attn", "block") else decoder_layer.post_attention_layernorm
    return [source.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
