"""Conversations from JSONL, as batches that a model can be measured and searched on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.tuning.encoding import IGNORE_INDEX, encode_conversation, render_prompt


def read_rows(path: Path, limit: int | None = None, seed: int = 233) -> list[dict[str, Any]]:
    """Rows of a ``messages`` JSONL file, a seeded sample of ``limit`` of them if it holds more.

    Raises :class:`UserError` with file and line for a row without messages.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected JSONL rows with a 'messages' list")
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(row, dict) or not row.get("messages"):
                raise UserError(f"{path}:{number}: no 'messages' list in this row")
            rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows if limit is None or len(rows) <= limit else random.Random(seed).sample(rows, limit)


def prompt_text(row: dict[str, Any], eos: str) -> str:
    """Rendered conversation of a row up to its last answer."""
    turns = row["messages"]
    return render_prompt(turns[:-1] if turns[-1]["role"] == "assistant" else turns, eos)


def prompt_batches(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int, device: torch.device | str = "cpu"
) -> list[dict[str, Tensor]]:
    """Left-padded batches ``{"input_ids": [b, t], "attention_mask": [b, t]}`` of prompts, shortest first."""
    ids = sorted((tokenizer(text)["input_ids"] for text in prompts), key=len)
    return [_pad(group, device) for group in _groups(ids, batch_size)]


def labelled_batches(
    rows: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_length: int,
    device: torch.device | str = "cpu",
) -> list[dict[str, Tensor]]:
    """Left-padded batches with ``labels [b, t]`` (-100 where no answer is scored), shortest first."""
    items = [encode_conversation(row["messages"], tokenizer, max_length) for row in rows]
    items.sort(key=lambda item: len(item["input_ids"]))
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
