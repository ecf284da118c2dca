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


def masked_text(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of encoded tokens, with ⟦ ⟧ around what carries loss."""
    parts = []
    for trained, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX):
        text = tokenizer.decode([token for token, _ in run])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)


def report(
    path: Path,
    tokenizer: str | Path,
    count: int,
    max_length: int = 2048,
    chat_template: str = "auto",
    measured: int = 10_000,
) -> str:
    """The first ``count`` rows of a file as they train, and token lengths of the first ``measured``.

    Args:
        max_length: tokens of a row at most, the rest is cut.

    Raises:
        UserError: for a file or a tokenizer that cannot be read, or where no row can be rendered.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    told, lengths, trained, faults = [], [], 0, []
    for number, line in islice(lines_of(path), max(count, measured)):
        row = checked_row(line, f"{path}:{number}")
        encoded, fault = encoded_or_fault(row, loaded, max_length)
        if len(faults) < count:
            told.append(_shown(row, encoded, fault, loaded, max_length))
        faults.append(fault)
        if encoded["labels"]:
            lengths.append(len(encoded["labels"]))
            trained += sum(label != IGNORE_INDEX for label in encoded["labels"])
    left_out = count_faults(faults)
    if not lengths:
        raise UserError(f"no row to measure ({left_out or 'the file holds none'})")
    tokens = np.array(lengths)
    quantiles = "  ".join(f"p{share} {np.percentile(tokens, share):,.0f}" for share in (10, 50, 90, 99))
    longer = int((tokens > max_length).sum())
    told += [
        f"tokens a row:  mean {tokens.mean():,.0f}  {quantiles}  max {tokens.max():,}",
        f"rows {len(tokens):,}, with loss on {trained / tokens.sum():.1%} of their tokens",
        f"longer than {max_length:,} tokens, so cut: {longer:,} ({longer / len(tokens):.1%})",
        f"nothing to learn: {left_out or 0}",
    ]
    return "\n".join(told)


def _shown(row: Mapping, encoded: Mapping, fault: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """A row under a line that says where it is from and how much of it is trained."""
    title = f"── {row.get('dataset', 'row')} {row.get('id', '')}".rstrip()
    ids, labels = encoded["input_ids"][:most], encoded["labels"][:most]
    if not ids:
        return f"{title}: {fault}\n"
    trained = sum(label != IGNORE_INDEX for label in labels)
    return f"{title}: {trained} of {len(ids)} tokens carry loss, in ⟦…⟧\n{masked_text(ids, labels, tokenizer)}"
