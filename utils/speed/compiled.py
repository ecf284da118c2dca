"""The dense model at its fastest in stock transformers: a static cache, and a compiled step replayed as one graph."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from router_tuning.speed.timing import now, seconds_between, spread


class _Clock(LogitsProcessor):
    """Notes when the logits of each token are there."""

    def __init__(self) -> None:
        self.moments: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.moments.append(now(scores.device))
        return scores


@torch.no_grad()
def compiled_decode(dense: PreTrainedModel, batch: int, length: int, tokens: int, warm_up: int) -> dict[str, Any]:
    """Seconds per token of ``generate(cache_implementation="static")``, which compiles by itself on a GPU.

    Args:
        batch, length: of the prompt. tokens: generated, the first ``warm_up`` of which (compilation) do not count.
    """
    ids = torch.randint(3, dense.config.vocab_size, (batch, length), device=dense.device)
    clock = _Clock()
    started = time.perf_counter()
    dense.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        cache_implementation="static",
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
        logits_processor=LogitsProcessorList([clock]),
    )
    steps = [seconds_between(*pair) for pair in zip(clock.moments, clock.moments[1:], strict=False)]
    whole = time.perf_counter() - started
    torch.compiler.reset()
    return {"batch": batch, "length": length, "seconds_dense": spread(steps[warm_up:]), "seconds_in_all": whole}
