"""Rows in batches: those of a training step, and those on which a run fits, chooses and calibrates.

Which rows make a step, and in which micro-batches, is a function of seed and epoch, not of the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from router_tuning.errors import UserError
from router_tuning.model import prompt_length_from, routed_modules
from router_tuning.tuning.encoding import IGNORE_INDEX
from router_tuning.tuning.tuning_data import TrainingData

Row = dict[str, list[int]]
Batch = dict[str, Tensor]
_ROWS = 64
_TOKENS = 8192


class StepOrder(Sampler[int]):
    """Row numbers in training order: global batches drawn at random, micro-batches of like lengths within each.

    Sorting within a global batch saves most of the padding and leaves what a step learns as drawn. The micro-batches
    go round the processes in turn, so neighbours in the order, which are alike, run at the same time. Rows that do
    not fill a last global batch are left out of the epoch (others each epoch), as in the published recipe: 1,000 rows
    are 15 steps of 64.
    """

    def __init__(self, lengths: Sequence[int], global_batch: int, seed: int, group: bool = True) -> None:
        if len(lengths) < global_batch:
            raise UserError(
                f"{len(lengths)} rows do not fill one step of {global_batch} sequences: "
                f"set --global_batch_size (GLOBAL_BATCH_SIZE) to at most {len(lengths)}, or use more data"
            )
        self.lengths, self.global_batch, self.seed, self.group = lengths, global_batch, seed, group
        self.steps = len(lengths) // global_batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given out."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.global_batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for step in range(self.steps):
            batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            if self.group:  # longest first: what does not fit in memory fails at the start of a step
                batch.sort(key=lambda row: -self.lengths[row])
            yield from batch


class Collator:
    """Pads rows on the right: ``input_ids``, ``attention_mask``, ``labels [b, t]`` and ``prompt_length [b]``.

    The last says where each prompt ends, whatever becomes of the labels on their way to the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id
        self.pad = tokenizer.eos_token_id if pad is None else pad

    def __call__(self, rows: list[Row]) -> Batch:
        def padded(values: list[list[int]], fill: int) -> Tensor:
            return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)

        ids = [row["input_ids"] for row in rows]
        mask = padded([[1] * len(row) for row in ids], 0)
        labels = padded([row["labels"] for row in rows], IGNORE_INDEX)
        return {
            "input_ids": padded(ids, self.pad),
            "attention_mask": mask,
            "labels": labels,
            "prompt_length": prompt_length_from(labels, mask),
        }


# ---- rows to fit, choose and calibrate on


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
    return inputs_of([generated_from(row, sequence) for row in rows], collator)


def generated_from(row: Row, prompt: bool) -> Row:
    """The tokens before the last that carries loss, or before the first (the ``prompt``); at least one."""
    learnt = [place for place, label in enumerate(row["labels"]) if label != IGNORE_INDEX] or [len(row["labels"])]
    length = max(1, learnt[0] if prompt else learnt[-1])
    return {name: row[name][:length] for name in ("input_ids", "labels")}


def is_sequence_level(model: nn.Module) -> bool:
    """Whether every router of a model decides per sequence, so that prompts are all it looks at."""
    return {module.mod_level for module in routed_modules(model).values()} == {"sequence"}
