"""Scores on lm-eval tasks, in process, document by document, with the cost of every task."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from router_tuning.errors import UserError
from router_tuning.evaluation.routed_lm import RoutedLM
from router_tuning.places import SHIPPED

TASK_CONFIGS = SHIPPED / "configs" / "lm_eval"
STOCK = "paper"
"""Folder of the groups whose tasks are lm-eval's own."""
SEED = 1234
"""As lm-eval has it: of the examples in prompts, and before a run."""
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
    loaded = load_tasks(tasks, tokenizer, num_fewshot, metadata)
    lm = RoutedLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=batch_size, under=under)
    set_seed(SEED)
    found = lm_eval.evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=1000)
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
    for task in load_tasks(tasks, tokenizer, num_fewshot, metadata)["tasks"].values() if tasks else ():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        for request in task.instances:
            text = "".join(part for part in request.args if isinstance(part, str))
            total += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return total


def load_tasks(
    tasks: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    num_fewshot: int | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tasks and groups as lm-eval's ``evaluate`` takes them; its thousands are only indexed when one is asked for.

    Tasks get the tokenizer's chat template and what ``metadata`` says, and ``num_fewshot`` unless their own is 0.

    Raises:
        UserError: for a task that neither we nor lm-eval have.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    told = {"chat_template": tokenizer.chat_template, "special_tokens": dict(tokenizer.special_tokens_map)}
    told |= metadata or {}
    manager = TaskManager(include_path=str(TASK_CONFIGS), include_defaults=False, metadata=told)
    ours = manager.task_index
    if any(name not in ours or ours[name].yaml_path.parent.name == STOCK for name in tasks):
        manager = TaskManager(include_path=str(TASK_CONFIGS), metadata=told)
    if missing := [name for name in tasks if name not in manager.task_index]:
        raise UserError(f"no lm-eval task named {', '.join(missing)}; ours are {', '.join(sorted(ours))}")
    loaded = manager.load(list(tasks))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own and num_fewshot is not None):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed=SEED)
    return loaded
