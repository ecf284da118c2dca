"""What a training file looks like to a model: conversations with the loss mask visible, and token lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Lengths:
    """Tokens ``[n]`` of each row before the cut, tokens with loss ``[n]``, and which rows teach nothing, as text."""

    tokens: np.ndarray
    trained: np.ndarray
    max_length: int
    left_out: str

    def table(self) -> str:
        """The statistics as text."""
        quantiles = {"mean": self.tokens.mean()}
        quantiles |= {f"p{share}": np.percentile(self.tokens, share) for share in (10, 50, 90, 99)}
        numbers = "  ".join(f"{name} {value:,.0f}" for name, value in quantiles.items())
        longer, total = int((self.tokens > self.max_length).sum()), len(self.tokens)
        return "\n".join(
            (
                f"tokens a row:  {numbers}  max {self.tokens.max():,}",
                f"rows {total:,}, with loss on {self.trained.sum() / self.tokens.sum():.1%} of their tokens",
                f"longer than {self.max_length:,} tokens, so cut: {longer:,} ({longer / total:.1%})",
                f"nothing to learn: {self.left_out or 0}",
            )
        )


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


def measure(rows: Iterable[Mapping], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Lengths:
    """Token lengths of rows; :class:`UserError` if there is none that can be rendered."""
    tokens, trained, faults = [], [], []
    for row in rows:
        encoded, fault = encoded_or_fault(row, tokenizer, max_length)
        faults.append(fault)
        if labels := encoded["labels"]:
            tokens.append(len(labels))
            trained.append(sum(label != IGNORE_INDEX for label in labels))
    if not tokens:
        raise UserError(f"no row to measure ({count_faults(faults) or 'the file holds none'})")
    return Lengths(np.array(tokens), np.array(trained), max_length, count_faults(faults))


def draw(lengths: Lengths, path: Path, title: str) -> None:
    """Histogram of the lengths as a figure; its format follows from the suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    top = np.percentile(lengths.tokens, 99.5)
    axes.hist(np.minimum(lengths.tokens, top), bins=60, color="#4477aa")
    axes.axvline(lengths.max_length, color="#cc3311", linestyle="--", linewidth=1, label="max_seq_length")
    axes.set_xlim(0, max(top, 1) * 1.02)
    axes.set(xlabel="tokens a row (the last bar: as many and more)", ylabel="rows", title=title)
    if lengths.max_length <= top:
        axes.legend()
    figure.savefig(path, dpi=150)


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

    The histogram is drawn beside the file, as ``token_lengths.png``. Raises :class:`UserError` for a file or a
    tokenizer that cannot be read.
    """
    loaded = load_tokenizer(tokenizer, chat_template)
    shown = preview(read_rows(path, count), loaded, max_length, colour)
    lengths = measure(read_rows(path, measured), loaded, max_length)
    figure = path.with_name("token_lengths.png")
    draw(lengths, figure, f"{path.parent.name}, {len(lengths.tokens):,} rows, tokenizer {Path(tokenizer).name}")
    return f"{shown}\n{lengths.table()}\nhistogram: {figure}"
