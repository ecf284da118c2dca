"""vLLM beside our own engine: whether it gives the same tokens, and what routing saves there beside the dense base."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from router_tuning.model.flops import saved_shares
from router_tuning.model.saving import read_router_config, thresholds_for

if TYPE_CHECKING:
    from vllm import LLM

Prompts = Sequence[list[int]]
BLOCK = 32
SETTINGS: dict[str, dict[str, Any]] = {
    "no prefix cache, chunks of 48, small cache": {
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 20,
    },
    "prefix cache, whole prefill": {"enable_prefix_caching": True, "enable_chunked_prefill": False},
}
"""Ways in which vLLM may split and repeat the same work; the first one preempts sequences."""


def our_model(export: Path, dtype: str) -> PreTrainedModel:
    """The export in transformers."""
    model = AutoModelForCausalLM.from_pretrained(export, dtype=getattr(torch, dtype), trust_remote_code=True)
    return model.eval()


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

    options = {"max_model_len": 512, "max_num_seqs": 16, "block_size": BLOCK, "disable_log_stats": False}
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
    llms: dict[str, LLM], export: Path, budgets: Sequence[float], prompts: Prompts, new_tokens: int, repeats: int
) -> list[dict[str, Any]]:
    """Tokens per second of the dense base and of the export at each budget, in turns; the median of the turns.

    Args:
        llms: ``dense`` and ``routed``. budgets: shares of the decoder's operations.
    """
    clock, config = _clock(), read_router_config(export)
    cases: list[tuple[str, float | None]] = [("dense", None), *[("routed", budget) for budget in budgets]]
    seconds: dict[Any, list[float]] = {case: [] for case in cases}
    shares: dict[Any, dict[str, float]] = {}
    for turn in range(repeats + 1):
        for name, budget in cases:
            llms[name].reset_prefix_cache()
            if budget is not None:
                thresholds = thresholds_for(config, budget, export, "flops")
                llms[name].apply_model(lambda model, thresholds=thresholds: model.set_thresholds(thresholds))
            if turn == 0:  # warms up, and counts
                shares[name, budget] = _kept(llms[name], prompts, new_tokens)
                continue
            started = clock()
            vllm_tokens(llms[name], prompts, new_tokens)
            seconds[name, budget].append(clock() - started)
    rows = []
    for case in cases:
        rate = len(prompts) * new_tokens / median(seconds[case])
        ratio = median(seconds[cases[0]]) / median(seconds[case])
        rows.append({"budget": case[1], "tokens_per_second": rate, "ratio": ratio, "kept": shares[case]})
    return rows


def flops_left(model: PreTrainedModel, kept: dict[str, float]) -> float:
    """Share of the decoder's operations that is left where each router keeps its share."""
    return 1.0 - sum(saved * (1.0 - kept[name]) for name, saved in saved_shares(model).items())


def _kept(llm: LLM, prompts: Prompts, new_tokens: int) -> dict[str, float]:
    """Share of the tokens of a batch that each routed module keeps; empty for a dense model."""
    counts: dict[str, list[int]] = {}

    def watch(model: Any) -> None:
        for name, module in getattr(model, "mod_modules", {}).items():
            counts[name] = [0, 0]

            def places(hidden: torch.Tensor, name: str = name, inner: Any = module.mod_places) -> Any:
                kept = inner(hidden)
                counts[name][0] += len(hidden) if kept is None else len(kept)
                counts[name][1] += len(hidden)
                return kept

            module.mod_places = places

    def unwatch(model: Any) -> None:
        for module in getattr(model, "mod_modules", {}).values():
            del module.mod_places

    llm.apply_model(watch)
    vllm_tokens(llm, prompts, new_tokens)
    llm.apply_model(unwatch)
    return {name: kept / seen for name, (kept, seen) in counts.items()}


def _clock() -> Callable[[], float]:
    """Time of the processor where it does the work, free of what others do there; else time as it passes."""
    return time.perf_counter if torch.accelerator.is_available() else time.process_time
