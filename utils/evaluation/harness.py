"""Scores of a model through lm-eval, in process, with the cost of every task and the origin of every number."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.evaluation.metered import MeteredLM
from router_tuning.provenance import provenance

TASK_CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "lm_eval"
SCORE_ORDER = ("exact_match", "acc_norm", "acc", "word_perplexity", "bits_per_byte")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int | str = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    include_path: Path = TASK_CONFIGS,
    under: AbstractContextManager | None = None,
) -> dict[str, Any] | None:
    """Score ``model`` on lm-eval tasks or groups and return a plain, JSON-ready dict (None on ranks other than 0).

    Keys: ``scores`` (``{task or group: {"metric,filter": value}}`` as lm-eval reports), ``groups`` (their names),
    ``samples`` (documents per task), ``task_versions``, ``meter`` (capacity and seconds per task, over all processes
    that were launched together), ``model`` (routing fields, ``router_pooling`` among them), ``settings`` and
    ``provenance``. Conversations are rendered in the tokenizer's chat template. ``under`` is a context entered around
    the evaluation, for example ``force_routing(model, mask)``.
    Raises :class:`UserError` for a task that does not exist.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rendering = {"chat_template": tokenizer.chat_template, "special_tokens": dict(tokenizer.special_tokens_map)}
    manager = task_manager(tasks, include_path, {**rendering, **(metadata or {})})
    model.eval()
    lm = MeteredLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    with under or nullcontext():
        found = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=1000,
        )
    meter = lm.gathered_meter()
    if found is None:
        return None
    return {
        "scores": {name: _numbers(scores) for name, scores in found["results"].items()},
        "groups": sorted(found.get("groups", {})),
        "samples": {task: count["effective"] for task, count in found["n-samples"].items()},
        "task_versions": found["versions"],
        "meter": meter,
        "model": describe(model),
        "settings": {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot},
        "provenance": provenance(),
    }


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Architecture, size, precision and routing fields of a model, for a results file."""
    config = model.config
    fields = {key: value for key, value in config.to_dict().items() if key.startswith("mod_")}
    return {
        "class": type(model).__name__,
        "name_or_path": config.name_or_path,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "routing": fields if fields.get("mod_layers") else None,
    }


def main_score(scores: Mapping[str, float]) -> tuple[str, float, float | None] | None:
    """Headline ``(metric, value, standard error)`` of one task's scores; None if it has none that we rank."""
    for metric in SCORE_ORDER:
        for key, value in scores.items():
            name, _, kind = key.partition(",")
            if name == metric:
                return metric, value, scores.get(f"{metric}_stderr,{kind}")
    return None


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in scores.items() if isinstance(value, (int, float)) and "," in key}


def task_manager(tasks: Sequence[str], include_path: Path, metadata: Mapping[str, Any] | None) -> TaskManager:
    """Index of our tasks, and of lm-eval's thousands only when one of those is asked for.

    Raises :class:`UserError` for a task that neither has.
    """
    for defaults in (False, True):
        manager = TaskManager(include_path=str(include_path), include_defaults=defaults, metadata=dict(metadata or {}))
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
