"""What the routers decide while a model answers prompts, token by token, as plain data for pages and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.evaluation.rows import Document
from router_tuning.evaluation.texts import answer_loss
from router_tuning.model import RoutingLog, record_routing, routed_modules, set_thresholds
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import encode_text, render_prompt
from router_tuning.viewer.dynamics import dynamics

POSITION_BINS = 10


@torch.no_grad()
def trace_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], max_new_tokens: int
) -> dict[str, Any]:
    """Greedy answer to one prompt and every decision on the way.

    Returns ``task``, ``tokens`` (text of the prompt's and the answer's tokens that were fed), ``prompt_tokens`` (how
    many of them are prompt), ``answer`` and ``routers``: ``{"<layer>.<part>": {"keep": …, "score": …}}`` with one
    number per sequence (sequence level) or a list of one per token; ``keep`` is the executed share, 0 or 1 but for
    experts. Experts have no score.
    """
    ids = torch.tensor([encode_text(render_prompt(row, tokenizer), tokenizer)], device=model.device)
    with record_routing(model) as log:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    fed = output[0, :-1] if output.shape[1] > ids.shape[1] else output[0]
    return {
        "task": str(row.get("task") or row.get("dataset") or "prompts"),
        "tokens": [_visible(tokenizer.decode([token])) for token in fed.tolist()],
        "prompt_tokens": ids.shape[1],
        "answer": tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip(),
        "routers": router_traces(model, log, len(fed)),
    }


def router_traces(model: PreTrainedModel, log: RoutingLog, tokens: int) -> dict[str, dict[str, Any]]:
    """Decisions and scores of one row from a recording, by router name, ``tokens`` per token-level router."""
    traces = {}
    for name, module in routed_modules(model).items():
        records = log.records[module.mod_key]
        if records[0].keep.dim() == 1:
            keep, logit = records[0].keep[0].item(), records[0].logits
            traces[name] = {
                "keep": int(keep),
                "score": None if logit is None else round(torch.sigmoid(logit[0]).item(), 4),
            }
            continue
        if module.mod_part == "expert":
            keep = torch.cat([record.keep.float().mean(dim=-1).flatten() for record in records])
            traces[name] = {"keep": _rounded(keep[:tokens]), "score": None}
            continue
        keep = torch.cat([record.keep[0].float() for record in records])[:tokens]
        logits = None if records[0].logits is None else torch.cat([record.logits[0] for record in records])[:tokens]
        traces[name] = {"keep": _rounded(keep), "score": None if logits is None else _rounded(torch.sigmoid(logits))}
    return traces


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
    prompts = [
        trace_prompt(model, tokenizer, row, max_new_tokens) for row in tqdm(rows, desc="prompts", unit="prompt")
    ]
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


def capacities(prompts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Executed shares: ``total``, ``by_router``, ``by_task`` (per router), and for token-level routers ``by_position``
    (tenths of the way through a sequence) and ``by_phase`` (``prompt``, ``generated``).

    Every prompt weighs the same, whatever its length; every router weighs the same in ``total``.
    """
    shares = {name: [_share(prompt["routers"][name]["keep"]) for prompt in prompts] for name in names}
    tasks = list(dict.fromkeys(prompt["task"] for prompt in prompts))
    by_task = {
        task: {
            name: _mean([s for s, prompt in zip(shares[name], prompts, strict=True) if prompt["task"] == task])
            for name in names
        }
        for task in tasks
    }
    found: dict[str, Any] = {
        "total": _mean([_mean(values) for values in shares.values()]),
        "by_router": {name: _mean(values) for name, values in shares.items()},
        "by_task": by_task,
    }
    token_level = [name for name in names if isinstance(prompts[0]["routers"][name]["keep"], list)]
    if token_level:
        found["by_position"] = {name: _by_position(prompts, name) for name in token_level}
        found["by_phase"] = {name: _by_phase(prompts, name) for name in token_level}
    return found


@torch.no_grad()
def dial_curve(
    model: PreTrainedModel,
    documents: Sequence[Document],
    collate: Collator,
    points: Sequence[tuple[str, float | dict[str, float]]],
) -> list[dict[str, Any]]:
    """Capacity reached and answer loss (nats per token) at every setting of the thresholds.

    ``points`` are ``(label, thresholds)`` as ``set_thresholds`` takes them; the model's own are restored afterwards.
    """
    before, curve = model.config.mod_threshold, []
    try:
        for label, thresholds in tqdm(points, desc="budget dial", unit="setting"):
            set_thresholds(model, thresholds)
            with record_routing(model) as log:
                loss = answer_loss(model, documents, collate)
            curve.append({"label": label, "capacity": float(log.capacity()["total"]), "loss": loss})
    finally:
        set_thresholds(model, before)
    return sorted(curve, key=lambda point: point["capacity"])


def threshold_sweep(prompts: Sequence[Mapping[str, Any]], count: int = 9) -> list[tuple[str, float]]:
    """One threshold for all routers at ``count`` quantiles of the scores seen: a dial for routers without one."""
    scores = [score for prompt in prompts for trace in prompt["routers"].values() for score in _scores(trace)]
    if not scores:
        return []
    quantiles = torch.tensor(scores).quantile(torch.linspace(0, 1, count)).tolist()
    return [(f"τ = {value:.3f}", min(max(value, 0.0), 1.0)) for value in dict.fromkeys(quantiles)]


def _scores(trace: Mapping[str, Any]) -> list[float]:
    score = trace["score"]
    return [] if score is None else score if isinstance(score, list) else [score]


def _by_position(prompts: Sequence[Mapping[str, Any]], name: str) -> list[float | None]:
    bins: list[list[float]] = [[] for _ in range(POSITION_BINS)]
    for prompt in prompts:
        keep = prompt["routers"][name]["keep"]
        for place, kept in enumerate(keep):
            bins[place * POSITION_BINS // len(keep)].append(kept)
    return [_mean(values) if values else None for values in bins]


def _by_phase(prompts: Sequence[Mapping[str, Any]], name: str) -> dict[str, float | None]:
    parts: dict[str, list[float]] = {"prompt": [], "generated": []}
    for prompt in prompts:
        keep, border = prompt["routers"][name]["keep"], prompt["prompt_tokens"]
        parts["prompt"] += keep[:border]
        parts["generated"] += keep[border:]
    return {phase: _mean(values) if values else None for phase, values in parts.items()}


def _share(keep: float | list[float]) -> float:
    return _mean(keep) if isinstance(keep, list) else float(keep)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.float().cpu().tolist()]


def _visible(text: str) -> str:
    return text.replace("\n", "⏎").replace(" ", "␣") if text.strip() != text or not text else text
