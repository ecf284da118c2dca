"""Scores on lm-eval tasks, in process, document by document, with the cost of every task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.evaluation.routed_lm import RoutedLM
from router_tuning.places import SHIPPED

TASK_CONFIGS = SHIPPED / "configs" / "lm_eval"
HEADLINES = ("exact_match", "acc_norm", "acc", "word_perplexity", "bits_per_byte")
"""Metrics that a task may be judged by; the first that it reports counts."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int | str = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    under: Callable[[str], AbstractContextManager] | None = None,
) -> dict[str, Any] | None:
    """Score ``model`` on lm-eval tasks or groups; conversations are rendered in the tokenizer's chat template.

    Args:
        limit: documents per task. num_fewshot: examples in the prompt, instead of what the tasks say.
        metadata: passed to the tasks. under: see :class:`RoutedLM`.

    Returns:
        JSON-ready, None on ranks other than 0. ``tasks``: by task all its ``scores`` (``{"metric,filter": value}`` as
        lm-eval reports), ``metric``, ``value`` and ``stderr`` of the one that it is judged by, ``documents`` (its
        value on each; a text of digits where all are 0 or 1), ``version``, and what the run cost (see
        :class:`RoutedLM`). ``groups``: scores by group.

    Raises:
        UserError: for a task that does not exist.
    """
    manager = task_manager(tasks, tokenizer, metadata)
    model.eval()
    lm = RoutedLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, under=under)
    found = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=1000,
    )
    costs = lm.gathered_costs()
    if found is None:
        return None
    scores = {name: _numbers(values) for name, values in found["results"].items()}
    return {
        "tasks": {
            name: {
                **_headline(scores[name], samples),
                "scores": scores[name],
                "version": found["versions"].get(name),
                **costs[name],
            }
            for name, samples in found["samples"].items()
        },
        "groups": {name: scores[name] for name in found.get("groups", {})},
    }


def main_score(scores: Mapping[str, float]) -> tuple[str, str, float, float | None] | None:
    """``(metric, filter, value, standard error)`` that a task is judged by; None if it has none that we know."""
    for metric in HEADLINES:
        for key, value in scores.items():
            name, _, kind = key.partition(",")
            if name == metric:
                return metric, kind, value, scores.get(f"{metric}_stderr,{kind}")
    return None


def _headline(scores: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if (best := main_score(scores)) is None:
        return {}
    metric, kind, value, stderr = best
    chosen = sorted((s for s in samples if s.get("filter", kind) == kind), key=lambda sample: sample["doc_id"])
    values = [sample.get(metric) for sample in chosen]
    found: dict[str, Any] = {"metric": metric, "value": value, "stderr": stderr, "samples": len(chosen)}
    if all(isinstance(v, (int, float)) for v in values):
        whole = all(v in (0, 1) for v in values)
        found["documents"] = "".join(str(int(v)) for v in values) if whole else [round(v, 4) for v in values]
    return found


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in scores.items() if isinstance(value, (int, float)) and "," in key}


def requested_tokens(
    tasks: Sequence[str],
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Tokens that a model reads to be scored on tasks; what it generates is not among them."""
    total = 0
    for task in task_manager(tasks, tokenizer, metadata).load(list(tasks))["tasks"].values() if tasks else ():
        if num_fewshot is not None:
            task.set_config("num_fewshot", num_fewshot)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        for request in task.instances:
            text = "".join(part for part in request.args if isinstance(part, str))
            total += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return total


def task_manager(
    tasks: Sequence[str], tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any] | None = None
) -> TaskManager:
    """Index of our tasks, and of lm-eval's thousands only when one of those is asked for.

    Tasks get the tokenizer's chat template, and what ``metadata`` says.

    Raises:
        UserError: for a task that neither has.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    told = {"chat_template": tokenizer.chat_template, "special_tokens": dict(tokenizer.special_tokens_map)}
    told |= metadata or {}
    for defaults in (False, True):
        manager = TaskManager(include_path=str(TASK_CONFIGS), include_defaults=defaults, metadata=told)
        if not defaults:
            ours = manager.all_tasks
        missing = [task for task in tasks if task not in manager.task_index]
        if not missing and (defaults or not _refers_to_stock(tasks, manager)):
            return manager
    if missing:
        raise UserError(f"no lm-eval task named {', '.join(missing)}; ours are {', '.join(ours)}")
    return manager


def _refers_to_stock(tasks: Sequence[str], manager: TaskManager) -> bool:
    """Whether one of the groups named holds a task that only lm-eval itself defines."""
    for task in tasks:
        members = (manager.task_index[task].cfg or {}).get("task")
        if isinstance(members, list):
            names = [
                member if isinstance(member, str) else member.get("task", member.get("group")) for member in members
            ]
            if any(name not in manager.task_index for name in names) or _refers_to_stock(names, manager):
                return True
    return False
