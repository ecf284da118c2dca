"""vLLM beside our own engine: whether it gives the same tokens, and what routing saves there beside the dense base."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from router_tuning.evaluation.texts import executed
from router_tuning.evaluation.timing import in_turns
from router_tuning.model import record_routing, set_thresholds
from router_tuning.model.saving import read_router_config, thresholds_for

if TYPE_CHECKING:
    from vllm import LLM

Prompts = Sequence[list[int]]
SETTINGS: dict[str, dict[str, Any]] = {
    "no prefix cache, chunks of 48, small cache": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 20,
    },
    "prefix cache, whole prefill": {"enable_prefix_caching": True, "enable_chunked_prefill": False},
}
"""Ways in which vLLM may split and repeat the same work; the first one preempts sequences."""
clock = time.perf_counter if torch.accelerator.is_available() else time.process_time
"""Time of the processor where it does the work, free of what others do there; else time as it passes."""


@torch.no_grad()
def our_tokens(model: PreTrainedModel, prompts: Prompts, new_tokens: int) -> list[list[int]]:
    """Greedy continuations, one prompt after the other; no token ends them."""
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": new_tokens, "do_sample": False, "repetition_penalty": 1.0, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def engine(model: Path, dtype: str, **settings: Any) -> LLM:
    """vLLM without graphs, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    options = {"max_model_len": 512, "max_num_seqs": 16, "block_size": 32, "disable_log_stats": False}
    return LLM(str(model), dtype=dtype, enforce_eager=True, **{**options, **settings})


def vllm_tokens(llm: LLM, prompts: Prompts, new_tokens: int) -> list[list[int]]:
    """Greedy continuations of a batch."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def equality(llm: LLM, prompts: Prompts, expected: Sequence[list[int]]) -> dict[str, Any]:
    """How many continuations are the same, in one batch and every third alone, and what vLLM did meanwhile.

    ``same_tokens`` is the share of tokens of both that are the same: after one that differs, others follow.
    """
    new_tokens = len(expected[0])
    batched = vllm_tokens(llm, prompts, new_tokens)
    single = [vllm_tokens(llm, [ids], new_tokens)[0] for ids in prompts[::3]]
    counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    pairs = [*zip(batched, expected, strict=True), *zip(single, expected[::3], strict=True)]
    same = [mine == theirs for pair in pairs for mine, theirs in zip(*pair, strict=True)]
    return {
        "batch": len(prompts),
        "equal_in_batch": sum(mine == theirs for mine, theirs in pairs[: len(prompts)]),
        "alone": len(single),
        "equal_alone": sum(mine == theirs for mine, theirs in pairs[len(prompts) :]),
        "same_tokens": sum(same) / len(same),
        "preemptions": counts["vllm:num_preemptions"],
        "prefix_hits": counts["vllm:prefix_cache_hits"],
    }


def throughput(
    llms: dict[str, LLM],
    model: PreTrainedModel,
    export: Path,
    budgets: Sequence[float],
    prompts: Prompts,
    new_tokens: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Tokens per second of the dense base and of the export at each budget, in turns; the median of the turns.

    Args:
        llms: ``dense`` and ``routed``. model: the export in transformers, which says what share of the operations is
            left. budgets: shares of the decoder's operations.
    """
    config = read_router_config(export)
    settings = {budget: thresholds_for(config, budget, export, "flops") for budget in budgets}

    def turn(budget: float | None) -> Callable[[int], float]:
        llm = llms["dense" if budget is None else "routed"]

        def seconds(_: int) -> float:
            llm.reset_prefix_cache()
            if budget is not None:
                llm.apply_model(lambda served: served.set_thresholds(settings[budget]))
            started = clock()
            vllm_tokens(llm, prompts, new_tokens)
            return clock() - started

        return seconds

    times = in_turns({budget: turn(budget) for budget in (None, *budgets)}, repeats + 1)
    seconds = {budget: median(found[1:]) for budget, found in times.items()}
    return [
        {
            "budget": budget,
            "tokens_per_second": len(prompts) * new_tokens / taken,
            "ratio": seconds[None] / taken,
            "flops_share": 1.0 if budget is None else share_left(model, settings[budget], prompts, new_tokens),
        }
        for budget, taken in seconds.items()
    ]


def share_left(model: PreTrainedModel, thresholds: dict[str, float], prompts: Prompts, new_tokens: int) -> float:
    """Share of the decoder's operations that is left while our engine continues the prompts."""
    set_thresholds(model, thresholds)
    with record_routing(model) as log:
        our_tokens(model, prompts, new_tokens)
    return executed(model, log)["share"]
