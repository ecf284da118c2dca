"""What a training step costs: time, and bytes that it holds, for routers alone and for what else one might do."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm
from transformers import PreTrainedModel

from router_tuning.model import record_routing
from router_tuning.speed.timing import timed

MODES = ("routers", "forced", "full")
"""Routers on a frozen base; the same, gradients forced through all layers as in the published code; all weights."""


@dataclass
class _Step:
    """One way to train, ready to step."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    run: Callable[[], None]


def measure_steps(
    build: Callable[[], PreTrainedModel],
    batch: dict[str, Tensor],
    rounds: int = 7,
    target: float = 0.5,
    modes: tuple[str, ...] = MODES,
) -> dict[str, Any]:
    """Time and memory of a step in each of ``modes``, all in this process and in turns.

    Args:
        build: gives a fresh routed model. batch: ``input_ids, attention_mask, labels [b, t]``.
        rounds: timed rounds after one warm-up; times are medians, ratios medians over rounds.

    Returns ``{mode: {"seconds", "saved_bytes", "state_bytes", "step_bytes", "peak_bytes"}}`` and the ratios of
    ``routers`` to the other two. ``saved_bytes`` are distinct storages that autograd holds for the backward pass,
    weights left out; ``state_bytes`` gradients and optimizer moments; ``step_bytes`` their sum; ``peak_bytes`` what
    the GPU's allocator saw at most (None on a CPU).
    """
    steps = {mode: _prepare(build(), mode, batch, target) for mode in modes}
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for number in tqdm(range(rounds + 1), desc="training steps", leave=False):
        for mode in modes if number % 2 else reversed(modes):
            seconds = timed(steps[mode].run, steps[mode].model.device)
            if number:
                times[mode].append(seconds)
    result: dict[str, Any] = {}
    for mode, step in steps.items():
        saved, peak = _memory(step)
        state = _state_bytes(step)
        result[mode] = {
            "seconds": statistics.median(times[mode]),
            "saved_bytes": saved,
            "state_bytes": state,
            "step_bytes": saved + state,
            "peak_bytes": peak,
        }
    mine = result["routers"]
    for other in set(modes) - {"routers"}:
        pairs = zip(times["routers"], times[other], strict=True)
        result[f"routers_to_{other}"] = {
            "time": statistics.median(a / b for a, b in pairs),
            "saved": mine["saved_bytes"] / result[other]["saved_bytes"],
            "step": mine["step_bytes"] / result[other]["step_bytes"],
            "peak": None if mine["peak_bytes"] is None else mine["peak_bytes"] / result[other]["peak_bytes"],
        }
    return result


def _prepare(model: PreTrainedModel, mode: str, batch: dict[str, Tensor], target: float) -> _Step:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(mode == "full" or "mod_router" in name)
    if mode == "forced":
        # Routed models ignore enable_input_require_grads(), which is what forced it there.
        model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run() -> None:
        with record_routing(model) as log:
            loss = model(**batch, use_cache=False).loss
        (loss + log.penalty(target)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return _Step(model, optimizer, run)


def _memory(step: _Step) -> tuple[int, int | None]:
    """Bytes saved for the backward pass of one step, and the allocator's peak."""
    weights = {p.untyped_storage().data_ptr() for p in step.model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    cuda = step.model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step.run()
    return sum(held.values()), torch.cuda.max_memory_allocated() if cuda else None


def _state_bytes(step: _Step) -> int:
    total = sum(p.grad.nbytes for p in step.model.parameters() if p.grad is not None)
    for values in step.optimizer.state.values():
        total += sum(v.nbytes for v in values.values() if isinstance(v, Tensor))
    return total
