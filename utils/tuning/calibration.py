"""Rows of the training data as batches without labels, on which a run fits, chooses and calibrates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from router_tuning.model import routed_modules
from router_tuning.tuning.batching import Collator
from router_tuning.tuning.encoding import IGNORE_INDEX
from router_tuning.tuning.tuning_data import TrainingData

Row = dict[str, list[int]]
Batch = dict[str, Tensor]
_ROWS = 64
_TOKENS = 8192


def drawn_rows(data: TrainingData, seed: int, tokens: int, other: bool = False) -> list[Row]:
    """Encoded rows drawn without replacement until they hold so many ``tokens``, or all rows.

    Args:
        other: draw from the other end of the same order, so that two draws share rows only where they must.
    """
    order = torch.randperm(len(data.rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, found = [], 0
    for number in reversed(order) if other else order:
        rows.append(data.rows[number])
        found += len(rows[-1]["input_ids"])
        if found >= tokens:
            break
    return rows


def in_batches(rows: Sequence[Row], collator: Collator, size: int, tokens: int = _TOKENS) -> list[Batch]:
    """Right-padded batches of like lengths, each of at most ``size`` rows and ``tokens`` places (or one row)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row["input_ids"])):
        here = batches[-1] if batches else []
        if not here or len(here) == size or (len(here) + 1) * len(row["input_ids"]) > tokens:
            batches.append(here := [])
        here.append(row)
    return [collator(batch) for batch in batches]


def inputs_of(rows: Sequence[Row], collator: Collator, size: int = _ROWS, tokens: int = _TOKENS) -> list[Batch]:
    """The same, of what a decoder takes."""
    batches = in_batches(rows, collator, size, tokens)
    return [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} for batch in batches]


def inputs_to_calibrate_on(rows: Sequence[Row], collator: Collator, sequence: bool) -> list[Batch]:
    """Batches for :func:`~router_tuning.model.dial.calibrate`: of each row what generation runs.

    At sequence level a decision is taken on the prompt. At token level tokens run that predict a learnt one, and not
    those behind the last of these: counted, they made generation run 0.7 points less than asked for.
    """
    return inputs_of([prompt_of(row) if sequence else predicting_part_of(row) for row in rows], collator)


def is_sequence_level(model: nn.Module) -> bool:
    """Whether every router of a model decides per sequence, so that prompts are all it looks at."""
    return {module.mod_level for module in routed_modules(model).values()} == {"sequence"}


def prompt_of(row: Row) -> Row:
    """The tokens before the first that carries loss (at least one)."""
    return _first(row, next((i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX), len(row["labels"])))


def predicting_part_of(row: Row) -> Row:
    """The tokens before the last one that carries loss (at least one)."""
    behind = next((i for i, label in enumerate(reversed(row["labels"]), 1) if label != IGNORE_INDEX), 0)
    return _first(row, len(row["labels"]) - behind)


def _first(row: Row, length: int) -> Row:
    return {name: row[name][: max(1, length)] for name in ("input_ids", "labels")}
