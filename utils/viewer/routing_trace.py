"""What the routers decide while a model answers prompts, token by token, as plain data for pages and figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.evaluation.documents import Document
from router_tuning.evaluation.texts import answer_loss
from router_tuning.model import RoutingLog, record_routing, routed_modules, set_thresholds
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import encode_text, render_prompt

BINS = 10
PHASES = ("prompt", "generated")
BATCH = 16
_PARTS = "¹²³⁴⁵⁶⁷⁸"
_MOST_PARTS = len(_PARTS)


@torch.no_grad()
def trace_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Greedy answers to one batch of prompts, and every decision on the way.

    Returns:
        Per row ``task``, ``prompt`` (what was asked last), ``tokens`` (text of those of the prompt and the answer that
        were fed), ``prompt_tokens`` (how many of them are prompt), ``answer``, ``routers`` (:func:`router_traces`).
    """
    prompts = [encode_text(render_prompt(row, tokenizer), tokenizer) for row in rows]
    width, filler = max(map(len, prompts)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[filler] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with record_routing(model) as log:
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=filler
        )
    ends, traces = model.generation_config.eos_token_id, []
    ends = {*ends} if isinstance(ends, list) else {ends}
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        new = output[number, width:].tolist()
        new = new[: next((place + 1 for place, token in enumerate(new) if token in ends), len(new))]
        fed, left, asked = prompt + new[:-1], width - len(prompt), row.get("messages", [])
        traces.append(
            {
                "task": str(row.get("task") or row.get("dataset") or "prompts"),
                "prompt": next((t["content"] for t in asked[::-1] if t["role"] == "user"), row.get("prompt", "")),
                "tokens": token_texts(tokenizer, fed),
                "prompt_tokens": len(prompt),
                "answer": tokenizer.decode(new, skip_special_tokens=True).strip(),
                "routers": router_traces(model, log, len(rows), number, slice(left, left + len(fed))),
            }
        )
    return traces


def router_traces(
    model: PreTrainedModel, log: RoutingLog, rows: int, row: int, tokens: slice
) -> dict[str, dict[str, Any]]:
    """Decisions and scores of one row of a recorded generation: ``{"<layer>.<part>": {"keep": …, "score": …}}``.

    One number each at sequence level, else a list with one per token; ``keep`` is the executed share, 0 or 1 but for
    experts, which have no score.

    Args:
        rows: of the batch. row: which of them.
        tokens: its places in the padded batch, and behind it, that were real and fed.
    """
    traces = {}
    for name, module in routed_modules(model).items():
        records = log.records[module.mod_key]
        keeps, logits = [record.keep for record in records], [record.logits for record in records]
        if module.mod_part == "expert":  # [tokens of all rows, experts of each]
            keeps, logits = [keep.float().mean(-1).view(rows, -1) for keep in keeps], [None]
        scores = None if logits[0] is None else [torch.sigmoid(values[row].float()) for values in logits]
        if keeps[0].dim() == 1:
            score = None if scores is None else round(scores[0].item(), 4)
            traces[name] = {"keep": int(keeps[0][row]), "score": score}
        else:
            keep = torch.cat([keep[row].float() for keep in keeps])[tokens]
            traces[name] = {"keep": _rounded(keep), "score": scores and _rounded(torch.cat(scores)[tokens])}
    return traces


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; tokens that share a character show it with their number: ``🙂¹ 🙂²``."""
    found: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        before = tokenizer.decode(ids[max(0, start - 1) : start], clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids[max(0, start - 1) : end], clean_up_tokenization_spaces=False)[len(before) :]
        if text.endswith("\ufffd") and end - start < _MOST_PARTS and end < len(ids):
            continue  # the first bytes of a character
        numbers = _PARTS[: end - start] if end - start > 1 else [""]
        found += [_visible(text) + number for number in numbers]
        start = end
    return found


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Traces of all rows with the summaries that a report shows.

    Returns ``prompts`` (traces), ``routers`` (names, shallowest first), ``capacity`` (see :func:`capacities`) and
    ``dynamics`` (of sequence-level routers, else None).
    """
    model.eval()
    traces: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(rows)), key=lambda number: len(str(rows[number])))  # like lengths together
    for first in tqdm(range(0, len(rows), BATCH), desc="prompts", unit="batch"):
        batch = order[first : first + BATCH]
        found = trace_prompts(model, tokenizer, [rows[number] for number in batch], max_new_tokens)
        traces |= zip(batch, found, strict=True)
    prompts = [traces[number] for number in range(len(rows))]
    names = list(prompts[0]["routers"])
    masks: dict[str, list[list[int]]] = {}
    for prompt in prompts:
        decided = [trace["keep"] for trace in prompt["routers"].values()]
        if all(isinstance(keep, int) for keep in decided):
            masks.setdefault(prompt["task"], []).append(decided)
    return {
        "routers": names,
        "prompts": prompts,
        "capacity": capacities(prompts, names),
        "dynamics": dynamics(masks) if masks else None,
    }


def dynamics(decisions: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, Any]:
    """How decisions per sequence vary over inputs and tasks.

    Args:
        decisions: ``{task: rows of 0/1 per router}``, at least one.

    Returns ``inputs``; ``masks``, how many different ones occur; ``most_common``, the share of the most frequent;
    ``mask_entropy`` and ``task_information`` of the whole mask, and in ``routers`` by router the share ``kept``, the
    ``entropy`` of its decision and its ``information`` about the task: in bits, the latter ``H(x) - H(x | task)``.
    """
    rows = {task: [tuple(row) for row in found] for task, found in decisions.items()}
    everything = [row for found in rows.values() for row in found]
    routers = []
    for column in zip(*everything, strict=True):
        place = len(routers)
        by_task = {task: [row[place] for row in found] for task, found in rows.items()}
        routers.append({"kept": _mean(column), "entropy": _entropy(column), "information": _information(by_task)})
    return {
        "inputs": len(everything),
        "masks": len(set(everything)),
        "most_common": Counter(everything).most_common(1)[0][1] / len(everything),
        "mask_entropy": _entropy(everything),
        "task_information": _information(rows),
        "routers": routers,
    }


def _entropy(values: Sequence[Any]) -> float:
    shares = [count / len(values) for count in Counter(values).values()]
    return -sum(share * math.log2(share) for share in shares)


def _information(by_task: Mapping[str, Sequence[Any]]) -> float:
    everything = [value for found in by_task.values() for value in found]
    within = sum(len(found) / len(everything) * _entropy(found) for found in by_task.values())
    return max(0.0, _entropy(everything) - within)


def capacities(prompts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Executed shares: ``total``, ``by_router``, ``by_task`` (per router), and for token-level routers ``by_position``
    (tenths of the way through a sequence) and ``by_phase`` (``prompt``, ``generated``).

    Every prompt weighs the same, whatever its length; every router weighs the same in ``total``.
    """

    def mean_share(name: str, task: str | None = None) -> float:
        keeps = [prompt["routers"][name]["keep"] for prompt in prompts if task in (None, prompt["task"])]
        return _mean([_mean(keep) if isinstance(keep, list) else keep for keep in keeps])

    def mean_by(name: str, group_of: Callable[[int, Mapping[str, Any]], Any], groups: Iterable[Any]) -> dict[Any, Any]:
        found: dict[Any, list[float]] = {group: [] for group in groups}
        for prompt in prompts:
            for place, kept in enumerate(prompt["routers"][name]["keep"]):
                found[group_of(place, prompt)].append(kept)
        return {group: _mean(values) if values else None for group, values in found.items()}

    tasks = dict.fromkeys(prompt["task"] for prompt in prompts)
    by_router = {name: mean_share(name) for name in names}
    found: dict[str, Any] = {
        "total": _mean([*by_router.values()]),
        "by_router": by_router,
        "by_task": {task: {name: mean_share(name, task) for name in names} for task in tasks},
    }
    if token_level := [name for name in names if isinstance(prompts[0]["routers"][name]["keep"], list)]:
        found["by_position"] = {
            name: [*mean_by(name, lambda n, prompt: n * BINS // len(prompt["tokens"]), range(BINS)).values()]
            for name in token_level
        }
        found["by_phase"] = {
            name: mean_by(name, lambda n, prompt: PHASES[n >= prompt["prompt_tokens"]], PHASES) for name in token_level
        }
    return found


@torch.no_grad()
def dial_curve(
    model: PreTrainedModel,
    documents: Sequence[Document],
    collate: Collator,
    points: Mapping[str, float | dict[str, float]],
) -> list[dict[str, Any]]:
    """Capacity reached and answer loss (nats per token) at every setting of the thresholds.

    ``points`` are thresholds by label, as ``set_thresholds`` takes them; the model's own are restored afterwards.
    """
    before, curve = model.config.mod_threshold, []
    try:
        for label, thresholds in tqdm(points.items(), desc="budget dial", unit="setting"):
            set_thresholds(model, thresholds)
            with record_routing(model) as log:
                loss = answer_loss(model, documents, collate)
            curve.append({"label": label, "capacity": float(log.capacity()["total"]), "loss": loss})
    finally:
        set_thresholds(model, before)
    return sorted(curve, key=lambda point: point["capacity"])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.float().cpu().tolist()]


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣") if text.strip() != text or not text else text
