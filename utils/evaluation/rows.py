"""Conversations from JSONL, as batches that a model can be measured and searched on."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router_tuning.data.rows import checked_row, lines_of
from router_tuning.errors import UserError
from router_tuning.tuning.encoding import IGNORE_INDEX, TemplateRefusal, encode_row, encode_text, render_prompt

logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
T = TypeVar("T")


def read_rows(path: Path, limit: int | None = None, seed: int = 233) -> list[dict[str, Any]]:
    """Rows of a training file, a seeded sample of ``limit`` of them if it holds more.

    Raises :class:`UserError` with file and line for what is no row.
    """
    rows = [checked_row(line, f"{path}:{number}") for number, line in lines_of(path)]
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows if limit is None or len(rows) <= limit else random.Random(seed).sample(rows, limit)


def rendered(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, str]]:
    """Rows with their prompts (see :func:`render_prompt`); those that the chat template refuses are told and left out.

    Raises :class:`UserError` if none is left.
    """
    return _accepted(rows, lambda row: (row, render_prompt(row, tokenizer)))


def encoded(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, list[int]]]:
    """Rows with their labels (see :func:`encode_row`); those that the chat template refuses are told and left out.

    Raises :class:`UserError` if none is left.
    """
    return _accepted(rows, lambda row: encode_row(row, tokenizer, max_length))


def _accepted(rows: Sequence[Row], make: Callable[[Row], T]) -> list[T]:
    found, refusals = [], []
    for row in rows:
        try:
            found.append(make(row))
        except TemplateRefusal as refusal:
            refusals.append(refusal)
    if refusals:
        told = f"refused by the chat template: {len(refusals)} of {len(rows)} rows ({refusals[0]})"
        if not found:
            raise UserError(told)
        logger.warning(told)
    return found


def prompt_batches(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """Left-padded batches ``{"input_ids": [b, t], "attention_mask": [b, t]}`` of rendered prompts, shortest first."""
    ids = sorted((encode_text(text, tokenizer) for text in prompts), key=len)
    return [_pad(group, device) for group in _groups(ids, batch_size)]


def labelled_batches(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Left-padded batches with ``labels [b, t]`` (-100 where no answer is scored), shortest first."""
    items = sorted(encoded(rows, tokenizer, max_length), key=lambda item: len(item["input_ids"]))
    batches = []
    for group in _groups(items, batch_size):
        batch = _pad([item["input_ids"] for item in group], device)
        labels = _pad([item["labels"] for item in group], device, IGNORE_INDEX)["input_ids"]
        batches.append({**batch, "labels": labels})
    return batches


def _groups(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pad(sequences: Sequence[list[int]], device: torch.device | str, value: int = 0) -> dict[str, Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
