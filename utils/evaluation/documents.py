"""Conversations and texts from files, as what a model can be measured on: documents, and padded batches of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from router_tuning.data.rows import checked_row, lines_of
from router_tuning.errors import UserError
from router_tuning.files import read_json_lines
from router_tuning.tuning.encoding import IGNORE_INDEX, TemplateRefusal, bos_of, encode_row, encode_text, render_prompt

CONTEXT = 16
"""Tokens at the beginning of a plain text that are given, not predicted: what routers of sequences decide on."""
logger = logging.getLogger(__name__)
Row = Mapping[str, Any]
Document = dict[str, list[int]]
"""``input_ids`` and ``labels`` of one row, -100 where nothing is predicted."""
T = TypeVar("T")


def read_rows(path: Path, limit: int | None = None, seed: int = 233) -> list[dict[str, Any]]:
    """Rows of a training file, a seeded sample of ``limit`` of them if it holds more.

    Raises:
        UserError: with file and line for what is no row.
    """
    rows = [checked_row(line, f"{path}:{number}") for number, line in lines_of(path)]
    if not rows:
        raise UserError(f"{path}: holds no rows")
    return rows if limit is None or len(rows) <= limit else random.Random(seed).sample(rows, limit)


def read_documents(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int, max_tokens: int, first: int = 0
) -> list[Document]:
    """Documents of a file: rows of a training file in order, of which answers are predicted, or windows of plain text.

    Plain text is a file that does not end in ``.jsonl``, or rows with ``text`` or ``page``; all tokens behind the
    first :data:`CONTEXT` are predicted. First come the first windows of all texts, then the second ones, and so on.

    Args:
        count: documents wanted. max_tokens: of a document. first: rows at the beginning of the file to pass over.

    Raises:
        UserError: with file and line for what is no row, or if there are no documents.
    """
    if path.suffix != ".jsonl":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        found = _windows([path.read_text(encoding="utf-8")], tokenizer, max_tokens)
    else:
        rows = list(lines_of(path))[first:]
        plain = rows and b'"messages"' not in rows[0][1] and b'"completion"' not in rows[0][1]
        if plain:
            texts = [row.get("text", row.get("page")) for row in read_json_lines(path)[first:]]
            if not all(isinstance(text, str) for text in texts):
                raise UserError(f"{path}: rows need messages, prompt and completion, or the text of 'text' or 'page'")
            found = _windows(texts, tokenizer, max_tokens)
        else:
            checked = (checked_row(line, f"{path}:{number}") for number, line in rows[:count])
            found = encoded(list(checked), tokenizer, max_tokens)
            found = [row for row in found if any(label != IGNORE_INDEX for label in row["labels"][1:])]
    if not found:
        raise UserError(f"{path}: no documents behind row {first} with anything to predict in {max_tokens} tokens")
    return found[:count]


def _windows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, size: int) -> list[Document]:
    start = encode_text(bos_of(tokenizer), tokenizer) if bos_of(tokenizer) else []
    ids = [encode_text(text, tokenizer) for text in texts]
    width, found = size - len(start), []
    for place in range(0, max(map(len, ids), default=0), width):
        windows = [start + text[place : place + width] for text in ids]
        found += [
            {"input_ids": window, "labels": [IGNORE_INDEX] * CONTEXT + window[CONTEXT:]}
            for window in windows
            if len(window) > 2 * CONTEXT
        ]
    return found


def longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest document that a model has positions for."""
    return min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings)


def rendered(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[tuple[Row, str]]:
    """Rows with their prompts (see :func:`render_prompt`); those that the chat template refuses are told and left out.

    Raises:
        UserError: if none is left.
    """
    return _accepted(rows, lambda row: (row, render_prompt(row, tokenizer)))


def encoded(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Document]:
    """Rows with their labels (see :func:`encode_row`); those that the chat template refuses are told and left out.

    Raises:
        UserError: if none is left.
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
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> list[dict[str, Tensor]]:
    """Left-padded batches ``{"input_ids": [b, t], "attention_mask": [b, t]}`` of rendered prompts, shortest first."""
    ordered = sorted(prompts, key=lambda text: len(encode_text(text, tokenizer)))
    options = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    batches = []
    for start in range(0, len(ordered), batch_size):
        batch = tokenizer(ordered[start : start + batch_size], **options)
        batches.append({name: batch[name] for name in ("input_ids", "attention_mask")})
    return batches
