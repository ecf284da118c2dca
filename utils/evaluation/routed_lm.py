"""lm-eval's Hugging Face model, which also notes what each task's requests cost, without touching a score."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from router_tuning.evaluation.texts import executed
from router_tuning.model import RoutingLog, is_routed, record_routing, routed_modules
from router_tuning.model.recording import routed_base


class RoutedLM(HFLM):
    """An ``HFLM`` that runs the requests of each task apart.

    ``costs[task]`` holds ``requests``, ``seconds`` (wall clock, this process) and, of a routed model, ``capacity`` by
    module, the ``share`` of the decoder's operations that was left, and ``decisions``: sequences or tokens decided on.

    Scores are those of ``HFLM``, whatever the batch. It pads on the right without an attention mask, and then every
    token is real: a model that decides per sequence would pool the padding, and what runs of it would count. Here a
    routed model gets requests of one length at a time, and is told where the prompts end. Stock lm-eval gives the same
    scores at batch size 1 (for ``router_pooling="sequence"``), and for models that decide per token at any.

    Launched as several processes (``accelerate launch``, ``torchrun``), each takes a share of the documents, which
    ``HFLM`` leaves to its caller for a model that is already loaded; :meth:`gathered_costs` then joins them.

    Args:
        under: given a task's name, a context in which its requests run, such as imposed decisions.
    """

    def __init__(self, *args: Any, under: Callable[[str], AbstractContextManager] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.costs: dict[str, dict[str, Any]] = {}
        self.under = under or (lambda task: nullcontext())
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
        """As ``HFLM.generate_until``, task by task, each as long as it says.

        A base's own ``max_new_tokens`` would count more than the ``max_length`` that ``HFLM`` passes.
        """
        config = self.model.generation_config
        before, config.max_new_tokens = config.max_new_tokens, None
        try:
            return self._by_task(super().generate_until, requests, disable_tqdm)
        finally:
            config.max_new_tokens = before

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list:
        """As in ``HFLM``; for a routed model in groups that need no padding."""
        if not is_routed(self.model):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        config = self.model.config
        told = "sequence" in config.mod_granularity and config.mod_router_pooling == "prompt"
        if self.batch_size == "auto" and override_bs is None:
            override_bs = self._detect_batch_size()
        groups: dict[tuple[int, int | None], list[int]] = {}
        for place, (_, context, answer) in enumerate(requests):
            length = len(answer) if told else None
            groups.setdefault((len(context) + len(answer), length), []).append(place)
        results: list[Any] = [None] * len(requests)
        for (_, self._answer), places in groups.items():
            answers = super()._loglikelihood_tokens([requests[place] for place in places], True, override_bs)
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
        self._answer = None
        return results

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """As in ``HFLM``; what it tries is no request, and no one counts what it runs."""
        if not is_routed(self.model):
            return super()._detect_batch_size(*args, **kwargs)
        decoder = routed_base(self.model)
        logs, decoder.mod_logs = decoder.mod_logs, ()
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            decoder.mod_logs = logs

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._answer is None:
            return super()._model_call(inps, *args, **kwargs)
        prompt = inps.shape[1] - (self._answer - 1)  # the answer's last token is never an input
        with torch.no_grad():
            return self.model(inps, prompt_length=torch.full_like(inps[:, 0], prompt)).logits

    def gathered_costs(self) -> dict[str, dict[str, Any]]:
        """``costs`` over all processes (what the others saw is empty on all but the first of them)."""
        everyone = self.gather_object(self.costs) or [self.costs]
        tasks = dict.fromkeys(task for costs in everyone for task in costs)
        return {task: merged([costs[task] for costs in everyone if task in costs]) for task in tasks}

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
        progress = tqdm(places.items(), unit="task", leave=False, disable=disable_tqdm or self.rank != 0)
        for task, mine in progress:
            progress.set_description(task)
            answers = self._counted(task, run, [requests[place] for place in mine])
            for place, answer in zip(mine, answers, strict=True):
                results[place] = answer
        for place in padding:
            results[place] = next(r for r, q in zip(results, requests, strict=True) if q is requests[place])
        return results

    def _counted(self, task: str, run: Callable[..., list], requests: list[Instance]) -> list:
        start = time.perf_counter()
        entry: dict[str, Any] = {"requests": len(requests)}
        with self.under(task), record_routing(self.model) if is_routed(self.model) else nullcontext() as log:
            answers = run(requests, True)
        if log is not None:
            entry |= executed(self.model, log) | {"decisions": _decided(self.model, log)}
        self.costs[task] = entry | {"seconds": time.perf_counter() - start}
        return answers


def merged(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What several processes noted of one task: counts add up, shares are of all, seconds those of the slowest."""
    found: dict[str, Any] = {"requests": sum(entry["requests"] for entry in entries)}
    if "capacity" in entries[0]:
        weights = [sum(entry["decisions"].values()) for entry in entries]
        counts = {name: sum(entry["decisions"][name] for entry in entries) for name in entries[0]["decisions"]}
        found["capacity"] = {
            name: sum(entry["capacity"][name] * entry["decisions"][name] for entry in entries) / max(count, 1)
            for name, count in counts.items()
        }
        found["share"] = sum(e["share"] * w for e, w in zip(entries, weights, strict=True)) / max(sum(weights), 1)
        found["decisions"] = counts
    return found | {"seconds": max(entry["seconds"] for entry in entries)}


def _decided(model: Any, log: RoutingLog) -> dict[str, int]:
    """Real sequences or tokens that each router decided on."""
    names = {module.mod_key: name for name, module in routed_modules(model).items()}
    return {
        names[key]: int(sum(r.keep.numel() if r.real is None else r.real.sum() for r in records))
        for key, records in log.records.items()
    }
