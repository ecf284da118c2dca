"""What a training file looks like to a model: conversations with the loss mask visible, and token lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from router_tuning.data.rows import checked_row, lines_of
from router_tuning.errors import UserError
from router_tuning.tuning.encoding import IGNORE_INDEX, load_tokenizer
from router_tuning.tuning.tuning_data import count_faults, encoded_or_fault

TRAINED = "⟦", "⟧"
COLOURS = "\033[32m⟦", "⟧\033[0m"


def read_rows(path: Path, limit: int | None = None) -> Iterator[dict]:
    """The first ``limit`` rows of a training file, checked."""
    return (checked_row(line, f"{path}:{number}") for number, line in islice(lines_of(path), limit))


def masked_text(
    labelled: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, colour: bool = False
) -> str:
    """Text of an encoded row with ⟦…⟧ around what carries loss."""
    opening, closing = COLOURS if colour else TRAINED
    parts = []
    pairs = zip(labelled["input_ids"], labelled["labels"], strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"{opening}{text}{closing}" if trained else text)
    return "".join(parts)


def preview(rows: Iterable[Mapping], tokenizer: PreTrainedTokenizerBase, max_length: int, colour: bool) -> str:
    """Rows one after the other, each under a line that says where it is from and how much of it is trained."""
    parts = []
    for row in rows:
        title = f"{row.get('dataset', 'row')} {row.get('id', '')}".strip()
        encoded, fault = encoded_or_fault(row, tokenizer, max_length)
        shown = {name: ids[:max_length] for name, ids in encoded.items()}
        tokens, trained = len(shown["input_ids"]), sum(label != IGNORE_INDEX for label in shown["labels"])
        cut = f", cut at {max_length}" if len(encoded["input_ids"]) > max_length else ""
        head = f"── {title}: {trained} of {tokens} tokens carry loss, in ⟦…⟧{cut}"
        parts.append(f"{head}\n{masked_text(shown, tokenizer, colour)}" if tokens else f"── {title}: {fault}\n")
    return "\n".join(parts)


def lengths(rows: Iterable[Mapping], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """Token lengths of rows before the cut, as text; :class:`UserError` if there is none that can be rendered."""
    found, trained, faults = [], 0, []
    for row in rows:
        encoded, fault = encoded_or_fault(row, tokenizer, max_length)
        faults.append(fault)
        if labels := encoded["labels"]:
            found.append(len(labels))
            trained += sum(label != IGNORE_INDEX for label in labels)
    left_out = count_faults(faults)
    if not found:
        raise UserError(f"no row to measure ({left_out or 'the file holds none'})")
    tokens = np.array(found)
    quantiles = {f"p{share}": np.percentile(tokens, share) for share in (10, 50, 90, 99)}
    numbers = "  ".join(f"{name} {value:,.0f}" for name, value in {"mean": tokens.mean(), **quantiles}.items())
    longer = int((tokens > max_length).sum())
    return (
        f"tokens a row:  {numbers}  max {tokens.max():,}\n"
        f"rows {len(tokens):,}, with loss on {trained / tokens.sum():.1%} of their tokens\n"
        f"longer than {max_length:,} tokens, so cut: {longer:,} ({longer / len(tokens):.1%})\n"
        f"nothing to learn: {left_out or 0}"
    )


def report(
    path: Path,
    tokenizer: str | Path,
    count: int,
    max_length: int = 2048,
    chat_template: str = "auto",
    measured: int | None = 10_000,
    colour: bool = False,
) -> str:
    """Preview of the first ``count`` rows of a file and the lengths of the first ``measured`` (None: of all).

    Raises :class:`UserError` for a file or a tokenizer that cannot be read.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    shown = preview(read_rows(path, count), loaded, max_length, colour)
    return f"{shown}\n{lengths(read_rows(path, measured), loaded, max_length)}"
