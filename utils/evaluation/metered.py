"""lm-eval's Hugging Face model with a meter: capacity and seconds of every task, without touching a score."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from router_tuning.model import RoutingLog, record_routing


class MeteredLM(HFLM):
    """An ``HFLM`` that runs the requests of each task apart and notes what they cost.

    ``meter[task]`` holds ``requests`` (count), ``seconds`` (wall clock, this process), and, for a routed model,
    ``capacity`` (``{"total": share, <router>: share}`` over the task's decisions) and ``decisions`` (``{<router>:
    count}`` of sequences or tokens decided). Scores are those of ``HFLM``: a sequence's result does not depend on its
    batch mates.

    Launched as several processes (``accelerate launch``, ``torchrun``), each takes a share of the documents, which
    ``HFLM`` leaves to its caller for a model that is already loaded; :meth:`gathered_meter` then joins their meters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter: dict[str, dict[str, Any]] = {}
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
