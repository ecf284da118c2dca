"""Scores of a routed model on held-out items: free-running exact match, choices, text, and what it executed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.embedded.sample_tasks import Item, final_answer
from router_tuning.model import RoutingLog, is_routed, record_routing
from router_tuning.model.recording import Record
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import encode_conversation, render_prompt

_TEXT_PROMPT = 16  # sequence level decides on this many first tokens of a bare text
_MAX_TOKENS = 512
HeldOut = Mapping[str, Sequence[Item]]


@dataclass
class Executed:
    """Shares of routed work that ran, counted over rows (sequence level) or tokens."""

    ran: dict[str, float] = field(default_factory=lambda: {"prompt": 0.0, "generated": 0.0})
    seen: dict[str, float] = field(default_factory=lambda: {"prompt": 0.0, "generated": 0.0})

    def add(self, phase: str, ran: Tensor | float, seen: Tensor | float) -> None:
        """Add one router's decisions of a phase."""
        self.ran[phase] += float(ran)
        self.seen[phase] += float(seen)

    def shares(self) -> dict[str, float]:
        """``prompt``, ``generated`` (token level only) and ``total``."""
        found = {phase: self.ran[phase] / self.seen[phase] for phase in self.ran if self.seen[phase]}
        seen = sum(self.seen.values())
        return {"total": sum(self.ran.values()) / seen if seen else 1.0, **found}


@torch.no_grad()
def score_generation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: HeldOut,
    batch_size: int = 128,
    max_new_tokens: int = 48,
) -> dict[str, Any]:
    """Greedy answers compared with the right ones, under the decisions that generation itself takes.

    Returns ``exact_match`` (``{task: share, "average": mean of tasks}``), ``capacity`` (of all items, and on prompt
    and generated tokens apart at token level), ``capacity_by_task`` and ``decisions`` (sequence level:
    ``{task: rows of 0/1 per router}``).
    """
    model.eval()
    right: dict[str, list[bool]] = {task: [] for task in held_out}
    executed = {task: Executed() for task in held_out}
    masks: dict[str, list[list[int]]] = {task: [] for task in held_out}
    for task, items in tqdm(held_out.items(), desc="generation", leave=False):
        prompts = [render_prompt({"messages": item.messages}, tokenizer) for item in items]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            options = {"padding": True, "padding_side": "left", "add_special_tokens": False}
            batch = tokenizer([prompts[n] for n in numbers], return_tensors="pt", **options)
            batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            new, rows = _generate(model, tokenizer, batch, max_new_tokens, executed[task])
            masks[task] += rows
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            right[task] += [final_answer(text) == items[n].answer for n, text in zip(numbers, texts, strict=True)]
    exact = {task: sum(found) / len(found) for task, found in right.items()}
    exact["average"] = sum(exact.values()) / len(exact)
    total = Executed()
    for part in executed.values():
        for phase in part.ran:
            total.add(phase, part.ran[phase], part.seen[phase])
    result = {"exact_match": exact, "items": sum(map(len, held_out.values()))}
    if is_routed(model):
        result["capacity"] = total.shares()
        result["capacity_by_task"] = {task: part.shares()["total"] for task, part in executed.items()}
        if any(masks.values()):
            result["decisions"] = masks
    return result


def _generate(model, tokenizer, batch, max_new_tokens, executed) -> tuple[Tensor, list[list[int]]]:
    """New tokens ``[b, s]``; sequence level: decisions of each row, router by router."""
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    width = batch["input_ids"].shape[1]
    if not is_routed(model):
        return model.generate(**batch, **options)[:, width:], []
    with record_routing(model) as log:
        new = model.generate(**batch, **options)[:, width:]
    # The end-of-sequence token is emitted, never fed: row i feeds as many new tokens as stand before it.
    ended = (new == tokenizer.eos_token_id).long().cumsum(1) > 0
    fed = ~ended[:, : new.shape[1] - 1]
    rows = []
    for records in log.records.values():
        first = records[0]
        if first.keep.dim() == 1:
            rows.append(first.keep.int().tolist())
            executed.add("prompt", first.keep.sum(), first.keep.numel())
            continue
        shares = [_by_token(record, len(new)) for record in records]
        executed.add("prompt", shares[0].sum(), batch["attention_mask"].sum())
        if len(records) > 1:
            later = torch.cat(shares[1:], dim=1)
            real = fed[:, : later.shape[1]]
            executed.add("generated", (later * real).sum(), real.sum())
    return new, [list(row) for row in zip(*rows, strict=True)]


def _by_token(record: Record, rows: int) -> Tensor:
    """Executed share of every token, float ``[b, t]``: 0 or 1, and for experts the share of its assignments."""
    if record.experts is None:
        return record.keep.float()
    return record.keep.view(rows, -1, record.keep.shape[1]).float().mean(-1)


def tokens_by_expert(log: RoutingLog) -> dict[str, dict[str, list[int]]]:
    """``{layer: {"assigned": per expert, "executed": per expert}}`` in tokens that are no padding; {} without experts.

    A token is assigned by the model's own gate, to several experts; its router decides for each whether it runs.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for key, records in log.records.items():
        if records[0].experts is None:
            continue
        count = 1 + max(int(record.experts.max()) for record in records)
        assigned, executed = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
        for record in records:
            real = torch.ones_like(record.keep) if record.real is None else record.real
            assigned += record.experts[real].bincount(minlength=count).cpu()
            executed += record.experts[record.keep & real].bincount(minlength=count).cpu()
        found[str(key)] = {"assigned": assigned.tolist(), "executed": executed.tolist()}
    return found


@torch.no_grad()
def score_choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, batch_size: int = 64
) -> dict[str, float]:
    """Accuracy by summed log-likelihood of the choices, decisions taken on the prompt: ``{task, "average"}``."""
    model.eval()
    collate, found = Collator(tokenizer), {}
    for task, items in tqdm(held_out.items(), desc="choices", leave=False):
        rows = [
            encode_conversation(
                [*item.messages[:-1], {"role": "assistant", "content": choice}], tokenizer, _MAX_TOKENS
            )
            for item in items
            for choice in item.choices
        ]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"]))
        total = torch.zeros(len(rows))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = collate([rows[n] for n in numbers])
            total[numbers] = -token_losses(model, batch)[0].cpu()
        best = total.view(len(items), -1).argmax(1).tolist()
        found[task] = sum(b == item.gold for b, item in zip(best, items, strict=True)) / len(items)
    found["average"] = sum(found.values()) / len(found)
    return found


def token_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the labelled tokens, and their number, each ``[b]``; decisions taken on the prompt."""
    logits, target = _predictions(model, batch)
    loss = cross_entropy(logits.transpose(1, 2), target, reduction="none", ignore_index=-100)
    return loss.sum(1), (target != -100).sum(1)


def _predictions(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Float32 logits ``[b, t-1, vocabulary]`` and what they should predict, ``[b, t-1]``."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    names = ("input_ids", "attention_mask", "prompt_length") if is_routed(model) else ("input_ids", "attention_mask")
    logits = model(**{name: batch[name] for name in names}, use_cache=False).logits[:, :-1]
    return logits.float(), batch["labels"][:, 1:]


def answers_right(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Whether every labelled token is the most likely one, bool ``[b]``; decisions are taken on the prompt."""
    logits, target = _predictions(model, batch)
    return ((logits.argmax(-1) == target) | (target == -100)).all(1)


@torch.no_grad()
def score_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int = 16
) -> dict[str, float]:
    """``perplexity`` per token of bare texts behind ``bos``, every token predicted, and the ``capacity`` on them.

    Token level is causal by itself; at sequence level the first 16 tokens decide.
    """
    model.eval()
    rows = [tokenizer(tokenizer.bos_token + text)["input_ids"][:_MAX_TOKENS] for text in texts]
    collate = Collator(tokenizer)
    loss, count, executed = 0.0, 0, Executed()
    for start in range(0, len(rows), batch_size):
        batch = collate([{"input_ids": ids, "labels": ids} for ids in rows[start : start + batch_size]])
        batch = {key: value.to(model.device) for key, value in batch.items()}
        inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")}
        if not is_routed(model):
            logits = model(**inputs, use_cache=False).logits
        else:
            inputs["prompt_length"] = torch.full((len(batch["input_ids"]),), _TEXT_PROMPT, device=model.device)
            with record_routing(model) as log:
                logits = model(**inputs, use_cache=False).logits
            for records in log.records.values():
                for record in records:
                    if record.keep.dim() == 1:
                        executed.add("prompt", record.keep.sum(), record.keep.numel())
                    else:
                        share = _by_token(record, len(batch["input_ids"]))
                        executed.add("prompt", share.sum(), batch["attention_mask"].sum())
        target = batch["labels"][:, 1:]
        part = cross_entropy(logits[:, :-1].float().transpose(1, 2), target, reduction="none", ignore_index=-100)
        loss += float(part.sum())
        count += int((target != -100).sum())
    result = {"perplexity": math.exp(loss / count), "tokens": count}
    if is_routed(model):
        result["capacity"] = executed.shares()["total"]
    return result
