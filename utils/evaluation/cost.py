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
        ``share`` of the decoder's operations and ``capacity`` on the prompts; ``kv_bytes_dense``, ``kv_bytes_routed``,
        ``kv_share`` (keys and values held after them); and for ``prefill`` and ``generate`` the ``share`` that ran,
        ``seconds_dense`` and ``seconds_routed``, medians of the rounds after a first that warms up, and
        ``time_ratio``, that of the two.
    """
    dense.eval(), routed.eval()
    models = {"dense": dense, "routed": routed}
    batches = [{name: value.to(dense.device) for name, value in batch.items()} for batch in batches]
    with under or nullcontext():
        with record_routing(routed) as log:
            held = {
                name: sum(kv_cache_bytes(_run(model, batch, 0).past_key_values) for batch in batches)
                for name, model in models.items()
            }
        found = {
            **executed(routed, log),
            "kv_bytes_dense": held["dense"],
            "kv_bytes_routed": held["routed"],
            "kv_share": held["routed"] / held["dense"],
            "prompts": sum(len(batch["input_ids"]) for batch in batches),
            "prompt_tokens": int(sum(batch["attention_mask"].sum() for batch in batches)),
            "new_tokens": new_tokens,
            "repeats": repeats,
        }
        with record_routing(routed) as log:
            _run_all(routed, batches, new_tokens)
        shares = {"prefill": found["share"], "generate": executed(routed, log)["share"]}
        for phase, tokens in (("prefill", 0), ("generate", new_tokens)):
            runs = {
                name: lambda _, model=model, tokens=tokens: timed(
                    lambda: _run_all(model, batches, tokens), model.device
                )
                for name, model in models.items()
            }
            times = in_turns(runs, repeats + 1, f"time, {phase}")
            seconds = {name: statistics.median(values[1:]) for name, values in times.items()}
            found[phase] = {
                "share": shares[phase],
                **{f"seconds_{name}": value for name, value in seconds.items()},
                "time_ratio": seconds["routed"] / seconds["dense"],
            }
    return found


def _run_all(model: PreTrainedModel, batches: Sequence[Batch], new_tokens: int) -> None:
    for batch in batches:
        _run(model, batch, new_tokens)


def _run(model: PreTrainedModel, batch: Batch, new_tokens: int) -> Any:
    """Generation of exactly so many tokens; with 0 the forward pass that it begins with."""
    if not new_tokens:
        return model(**batch, use_cache=True, logits_to_keep=1)
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
    return model.generate(**batch, **options)
