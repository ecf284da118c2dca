"""What is timed beside routed and dense passes: a training step, the fastest stock decoding, a profile of one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from router_tuning.evaluation.timing import spread, timed
from router_tuning.model import record_routing
from router_tuning.speed.cells import Row, free_memory

GROUPS = {
    "launches": ("LaunchKernel",),
    "host_waits": ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
    "copies_to_host": ("Memcpy DtoH",),
}
"""Names of the runtime's events, by what they are to the host."""


def training_step(model: PreTrainedModel, batch: int, length: int, rounds: int, everything: bool = False) -> Row:
    """A step of AdamW on ``[batch, length]`` tokens, in as many micro-batches as the memory asks for.

    Args:
        model: routed; its weights stay as they are (the rate is zero). rounds: timed steps, at least 2.
        everything: whether all weights train, or the routers alone.

    Returns ``seconds_step``, the median; ``micro_batch``, ``spread`` of the seconds of one such part, and the
    ``peak_bytes`` of a first one: activations, gradients and the optimizer's state.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or "mod_router" in name)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=model.device)
    for rows in (batch >> halvings for halvings in range(batch.bit_length())):
        try:
            found = _measured_step(model.train(), ids[:rows], rounds)
            return {"micro_batch": rows, "seconds_step": found["spread"]["median"] * batch / rows, **found}
        except torch.OutOfMemoryError:
            free_memory()
        finally:
            model.zero_grad()
    raise torch.OutOfMemoryError(f"not even one sequence of {length} tokens fits")


def _measured_step(model: PreTrainedModel, ids: torch.Tensor, rounds: int) -> Row:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run() -> None:
        with record_routing(model) as log:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        (loss + log.penalty(0.5)).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_bytes(run, ids.device)
    return {"peak_bytes": peak, "spread": spread([timed(run, ids.device) for _ in range(rounds)])}


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of one run over what was held before it, as CUDA's allocator knows it; None elsewhere."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def compiled_decode(dense: PreTrainedModel, batch: int, length: int, tokens: int) -> Row:
    """``seconds_step``, per token of ``generate(cache_implementation="static")``, which compiles by itself on a GPU.

    Args:
        batch, length: of the prompt. tokens: generated, at least 2. A first generation compiles, untimed.
    """
    ids = torch.randint(3, dense.config.vocab_size, (batch, length), device=dense.device)

    def generate(count: int) -> None:
        options = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0}
        options |= {"attention_mask": torch.ones_like(ids), "min_new_tokens": count, "max_new_tokens": count}
        dense.generate(ids, **options)

    generate(tokens)  # the longest first: its cache serves the shorter one, so that nothing compiles anew
    first, all_of_them = (timed(lambda n=count: generate(n), ids.device) for count in (1, tokens))
    torch.compiler.reset()
    return {"seconds_step": (all_of_them - first) / (tokens - 1)}


def profile_step(step: Callable[[], Any], device: torch.device, top: int = 3) -> dict[str, Any]:
    """One profiled run of a warm ``step``.

    Returns ``device_ms`` (sum over kernels; on a CPU over operators), how often each of :data:`GROUPS` occurred, and
    the ``top`` kernels or operators as ``[name, calls, ms]``.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    events = recorded.key_averages()
    kernels = [e for e in events if not cuda or e.device_type == DeviceType.CUDA]
    busy = [(e.key, e.count, e.self_device_time_total if cuda else e.self_cpu_time_total) for e in kernels]
    busy.sort(key=lambda one: -one[2])
    counts = {
        group: sum(event.count for event in events if any(part in event.key for part in parts))
        for group, parts in GROUPS.items()
    }
    longest = [[name[:120], calls, round(micro / 1e3, 4)] for name, calls, micro in busy[:top]]
    return {"device_ms": sum(one[2] for one in busy) / 1e3, **counts, "top": longest}
