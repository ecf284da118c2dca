"""What a training file looks like to a model: conversations with the loss mask visible, and token lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def masked_text(
    labelled: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str] = TRAINED
) -> str:
    """Text of an encoded row with marks around what carries loss."""
    parts = []
    pairs = zip(labelled["input_ids"], labelled["labels"], strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(text.join(marks) if trained else text)
    return "".join(parts)


def report(
    path: Path,
    tokenizer: str | Path,
    count: int,
    max_length: int = 2048,
    chat_template: str = "auto",
    measured: int | None = 10_000,
    colour: bool = False,
) -> str:
    """The first ``count`` rows of a file as they train, and token lengths of the first ``measured`` (None: of all).

    Raises:
        UserError: for a file or a tokenizer that cannot be read, or where no row can be rendered.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    told, found, trained, faults, longest = [], [], 0, [], max(count, measured or count)
    for number, line in islice(lines_of(path), longest if measured else None):
        row = checked_row(line, f"{path}:{number}")
        encoded, fault = encoded_or_fault(row, loaded, max_length)
        if len(faults) < count:
            told.append(_shown(row, encoded, fault, loaded, max_length, COLOURS if colour else TRAINED))
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
    told += [
        f"tokens a row:  {numbers}  max {tokens.max():,}",
        f"rows {len(tokens):,}, with loss on {trained / tokens.sum():.1%} of their tokens",
        f"longer than {max_length:,} tokens, so cut: {longer:,} ({longer / len(tokens):.1%})",
        f"nothing to learn: {left_out or 0}",
    ]
    return "\n".join(told)


def _shown(
    row: Mapping, encoded: Mapping, fault: str, tokenizer: PreTrainedTokenizerBase, most: int, marks: tuple[str, str]
) -> str:
    """A row under a line that says where it is from and how much of it is trained."""
    title = f"{row.get('dataset', 'row')} {row.get('id', '')}".strip()
    shown = {name: ids[:most] for name, ids in encoded.items()}
    tokens, trained = len(shown["input_ids"]), sum(label != IGNORE_INDEX for label in shown["labels"])
    if not tokens:
        return f"── {title}: {fault}\n"
    cut = f", cut at {most}" if len(encoded["input_ids"]) > most else ""
    return f"── {title}: {trained} of {tokens} tokens carry loss, in ⟦…⟧{cut}\n{masked_text(shown, tokenizer, marks)}"
