"""lm-eval's Hugging Face model with a meter: capacity and seconds of every task, without touching a score."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from router_tuning.model import RoutingLog, record_routing


class MeteredLM(HFLM):
    """An ``HFLM`` that runs the requests of each task apart and notes what they cost.

    ``meter[task]`` holds ``requests`` (count), ``seconds`` (wall clock, this process), and, for a routed model,
    ``capacity`` (``{"total": share, <router>: share}`` over the task's decisions) and ``decisions`` (``{<router>:
    count}`` of sequences or tokens decided).

    Scores are those of ``HFLM``, whatever the batch. It pads on the right without an attention mask, and then every
    token is real: a model that decides per sequence would pool the padding. Here such a model gets requests of one
    length at a time, and is told where the prompts end. Stock lm-eval gives the same scores at batch size 1 (for
    ``router_pooling="sequence"``), and for models that decide per token at any.

    Launched as several processes (``accelerate launch``, ``torchrun``), each takes a share of the documents, which
    ``HFLM`` leaves to its caller for a model that is already loaded; :meth:`gathered_meter` then joins their meters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter: dict[str, dict[str, Any]] = {}
        self._answer: int | None = None  # tokens of the answers under way
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As ``HFLM.loglikelihood``, task by task."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As ``HFLM.loglikelihood_rolling``, task by task, behind one beginning-of-sequence token.

        ``HFLM`` puts a token in front of the text itself, beside the one that some tokenizers add.
        """
        before, self.add_bos_token = self.add_bos_token, False
        try:
            return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As ``HFLM.generate_until``, task by task."""
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list:
        """As in ``HFLM``; for a model that decides per sequence in groups that need no padding."""
        config = self.model.config
        if "sequence" not in (getattr(config, "mod_granularity", None) or ""):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if self.batch_size == "auto" and override_bs is None:
            override_bs = self._detect_batch_size()
        groups: dict[tuple[int, int | None], list[int]] = {}
        for place, (_, context, answer) in enumerate(requests):
            length = len(answer) if config.mod_router_pooling == "prompt" else None
            groups.setdefault((len(context) + len(answer), length), []).append(place)
        results: list[Any] = [None] * len(requests)
        for (_, self._answer), places in groups.items():
            answers = super()._loglikelihood_tokens([requests[place] for place in places], True, override_bs)
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
        self._answer = None
        return results

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._answer is None:
            return super()._model_call(inps, *args, **kwargs)
        prompt = inps.shape[1] - (self._answer - 1)  # the answer's last token is never an input
        with torch.no_grad():
            return self.model(inps, prompt_length=torch.full_like(inps[:, 0], prompt)).logits

    def gathered_meter(self) -> dict[str, dict[str, Any]]:
        """The meter over all processes (what the others saw is empty on all but the first of them)."""
        return merged_meters(self.gather_object(self.meter) or [self.meter])

    def _by_task(self, run: Callable[..., list], requests: Sequence[Instance], disable_tqdm: bool) -> list:
        places: dict[str, list[int]] = {}
        times: dict[int, int] = {}
        padding = []
        for place, request in enumerate(requests):
            times[id(request)] = times.get(id(request), 0) + 1
            # lm-eval evens out the processes' shares by repeating a process's last request: not worth running twice.
            if times[id(request)] > request.repeats:
                padding.append(place)
            else:
                places.setdefault(request.task_name or "", []).append(place)
        results: list[Any] = [None] * len(requests)
        progress = tqdm(places.items(), unit="task", disable=disable_tqdm or self.rank != 0)
        for task, mine in progress:
            progress.set_description(task)
            answers = self._metered(task, run, [requests[place] for place in mine])
            for place, answer in zip(mine, answers, strict=True):
                results[place] = answer
        for place in padding:
            results[place] = next(r for r, q in zip(results, requests, strict=True) if q is requests[place])
        return results

    def _metered(self, task: str, run: Callable[..., list], requests: list[Instance]) -> list:
        start = time.perf_counter()
        entry: dict[str, Any] = {"requests": len(requests)}
        if getattr(self.model.config, "mod_layers", None):
            with record_routing(self.model) as log:
                answers = run(requests, True)
            entry["capacity"] = {str(key): float(share) for key, share in log.capacity().items()}
            entry["decisions"] = _decided(log)
        else:
            answers = run(requests, True)
        entry["seconds"] = time.perf_counter() - start
        self.meter[task] = entry
        return answers


def merged_meters(meters: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """One meter from those of several processes: requests and decisions add up, a capacity is the share of them all,
    seconds are those of the slowest.
    """
    merged = {}
    for task in dict.fromkeys(task for meter in meters for task in meter):
        entries = [meter[task] for meter in meters if task in meter]
        found: dict[str, Any] = {"requests": sum(entry["requests"] for entry in entries)}
        if "capacity" in entries[0]:
            routers = entries[0]["decisions"]
            counts = {key: sum(entry["decisions"][key] for entry in entries) for key in routers}
            shares = {
                key: sum(entry["capacity"][key] * entry["decisions"][key] for entry in entries) / max(counts[key], 1)
                for key in routers
            }
            found["capacity"] = {"total": sum(shares.values()) / len(shares), **shares}
            found["decisions"] = counts
        merged[task] = found | {"seconds": max(entry["seconds"] for entry in entries)}
    return merged


def _decided(log: RoutingLog) -> dict[str, int]:
    """Real sequences or tokens that each router decided on."""
    return {
        str(key): int(sum(r.keep.numel() if r.real is None else r.real.sum() for r in records))
        for key, records in log.records.items()
    }
