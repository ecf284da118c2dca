"""lm-eval's Hugging Face model with a meter: capacity and seconds of every task, without touching a score."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from utils.model import record_routing


class MeteredLM(HFLM):
    """An ``HFLM`` that runs the requests of each task apart and notes what they cost.

    ``meter[task]`` holds ``requests`` (count), ``seconds`` (wall clock, this process), and, for a routed model,
    ``capacity`` (``{"total": share, <router>: share}`` over the task's decisions). Scores are those of ``HFLM``:
    a sequence's result does not depend on its batch mates.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter: dict[str, dict[str, Any]] = {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As ``HFLM.loglikelihood``, task by task."""
        return self._by_task(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As ``HFLM.loglikelihood_rolling``, task by task."""
        return self._by_task(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As ``HFLM.generate_until``, task by task."""
        return self._by_task(super().generate_until, requests, disable_tqdm)

    def _by_task(self, run: Callable[..., list], requests: Sequence[Instance], disable_tqdm: bool) -> list:
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name or "", []).append(place)
        results: list[Any] = [None] * len(requests)
        progress = tqdm(places.items(), unit="task", disable=disable_tqdm or self.rank != 0)
        for task, mine in progress:
            progress.set_description(task)
            answers = self._metered(task, run, [requests[place] for place in mine])
            for place, answer in zip(mine, answers, strict=True):
                results[place] = answer
        return results

    def _metered(self, task: str, run: Callable[..., list], requests: list[Instance]) -> list:
        start = time.perf_counter()
        entry: dict[str, Any] = {"requests": len(requests)}
        if getattr(self.model.config, "mod_layers", None):
            with record_routing(self.model) as log:
                answers = run(requests, True)
            entry["capacity"] = {str(key): float(share) for key, share in log.capacity().items()}
        else:
            answers = run(requests, True)
        entry["seconds"] = time.perf_counter() - start
        self.meter[task] = entry
        return answers
