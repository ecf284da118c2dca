"""What routing saves: measured seconds, and bytes of keys and values."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from router_tuning.evaluation.texts import executed
from router_tuning.evaluation.timing import in_turns, timed
from router_tuning.model import kv_cache_bytes, record_routing

Batch = dict[str, Tensor]


@torch.no_grad()
def measure_cost(
    dense: PreTrainedModel,
    routed: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    new_tokens: int = 16,
    repeats: int = 5,
    under: AbstractContextManager | None = None,
) -> dict[str, Any]:
    """Cost of ``routed`` beside ``dense`` on the same prompts.

    Args:
        batches: left-padded prompts, ``{"input_ids": [b, t], "attention_mask": [b, t]}`` each.
        new_tokens: tokens generated per prompt for the decoding time.
        repeats: timed rounds over all batches; both models take turns within every round.
        under: a context around all of it, such as imposed decisions.

    Returns:
        ``share`` and ``capacity`` on the prompts, ``kv_bytes_dense``, ``kv_bytes_routed``, ``kv_share`` (keys and
        values held after them), and for ``prefill`` and ``generate`` what :func:`interleaved_times` gives.
    """
    dense.eval(), routed.eval()
    with under or nullcontext():
        with record_routing(routed) as log:
            held = [
                sum(kv_cache_bytes(model(**batch, use_cache=True).past_key_values) for batch in batches)
                for model in (dense, routed)
            ]
        return {
            **executed(routed, log),
            "kv_bytes_dense": held[0],
            "kv_bytes_routed": held[1],
            "kv_share": held[1] / held[0],
            "prompts": sum(len(batch["input_ids"]) for batch in batches),
            "prompt_tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "new_tokens": new_tokens,
            "repeats": repeats,
            "prefill": interleaved_times(dense, routed, batches, 0, repeats),
            "generate": interleaved_times(dense, routed, batches, new_tokens, repeats),
        }


def interleaved_times(
    dense: PreTrainedModel, routed: PreTrainedModel, batches: Sequence[Batch], new_tokens: int, repeats: int
) -> dict[str, float]:
    """``seconds_dense`` and ``seconds_routed``, medians over rounds in which both take turns, and ``time_ratio``.

    The ratio is that of the two medians. A first round warms up.

    Args:
        new_tokens: 0 times the forward over the prompts, else generation of exactly that many tokens.
    """
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}

    def run(model: PreTrainedModel) -> None:
        for batch in batches:
            model.generate(**batch, **options) if new_tokens else model(**batch, use_cache=True)

    models = {"dense": dense, "routed": routed}
    runs = {name: lambda _, model=model: timed(lambda: run(model), model.device) for name, model in models.items()}
    found = in_turns(runs, repeats + 1, f"time, {new_tokens} new tokens")
    seconds = {name: statistics.median(values[1:]) for name, values in found.items()}
    ratio = seconds["routed"] / seconds["dense"]
    return {"seconds_dense": seconds["dense"], "seconds_routed": seconds["routed"], "time_ratio": ratio}
