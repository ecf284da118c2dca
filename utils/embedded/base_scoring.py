"""Scores of the embedded base on held-out items: exact match of real greedy generation, choices, perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.embedded.sample_tasks import Item, final_answer
from router_tuning.tuning.encoding import render_prompt


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    batch_size: int = 64,
    max_new_tokens: int = 48,
) -> list[str]:
    """Greedy answers, one per item, in order; batches are padded on the left, grouped by length."""
    prompts = [render_prompt({"messages": item.messages}, tokenizer) for item in items]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        options = {"padding": True, "padding_side": "left", "add_special_tokens": False}
        batch = tokenizer([prompts[number] for number in numbers], return_tensors="pt", **options).to(model.device)
        batch.pop("token_type_ids", None)
        output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, batch["input_ids"].shape[1] :]
        for number, text in zip(numbers, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            answers[number] = text
    return answers


def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], batch_size: int = 64
) -> float:
    """Share of items whose greedy answer equals ``answer`` (see :func:`sample_tasks.final_answer`)."""
    answers = generate_answers(model, tokenizer, items, batch_size)
    right = [final_answer(text) == item.answer for text, item in zip(answers, items, strict=True)]
    return sum(right) / len(right)


@torch.no_grad()
def text_perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Perplexity per token of bare texts behind ``bos``, every token predicted."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(tokenizer.bos_token + text, return_tensors="pt")["input_ids"].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: dict[str, list[Item]],
    free_tasks: Sequence[str],
    batch_size: int = 64,
) -> dict[str, dict[str, float]]:
    """``{"exact_match": {task: share, "average": mean}, "perplexity": {free task: per token}}``."""
    model.eval()
    matches, perplexities = {}, {}
    for task, items in tqdm(held_out.items(), desc="held-out tasks", leave=False):
        if task in free_tasks:
            perplexities[task] = text_perplexity(model, tokenizer, [item.answer for item in items])
        else:
            matches[task] = exact_match(model, tokenizer, items, batch_size)
    matches["average"] = sum(matches.values()) / len(matches)
    return {"exact_match": matches, "perplexity": perplexities}
