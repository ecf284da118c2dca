"""Instruction tasks of graded difficulty that a tiny language model can learn.

Every item is a pure function of ``(task, split, seed)``. A hash of the item's content decides whether it belongs to
the ``train`` or the ``heldout`` split, so the two never share an input, however many items are drawn. The invented
facts are the exception: a fact belongs to both splits, its *phrasing* to one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from router_tuning.embedded import sample_drafts as drafts
from router_tuning.embedded import sample_texts as texts
from router_tuning.embedded.sample_drafts import Draft
from router_tuning.errors import UserError

SPLITS = ("train", "heldout")
HELDOUT_SHARE = 8
"""One content in this many is held out."""

MAKERS: dict[str, Callable[[random.Random], Draft]] = {
    "copy": drafts.copy,
    "reverse": drafts.reverse,
    "sort": drafts.sort,
    "lookup": drafts.lookup,
    "count": drafts.count,
    "max": drafts.extreme,
    "add": drafts.add,
    "fact": drafts.fact,
    "compare": drafts.compare,
    "math": drafts.math,
    "code": drafts.code,
    "dialogue": texts.dialogue,
    "story": texts.story,
}
TASKS = tuple(MAKERS)

FORMAT_OF_TASK = {
    "dialogue": "vicuna_sharegpt",
    "story": "evol_instruct",
    "compare": "slim_orca",
    "math": "meta_math_qa",
    "code": "evol_code_alpaca",
}
"""Raw format in which a task is published in ``data/sample/raw``; every other task is in ``alpaca``."""

FREE_TASKS = ("story",)
"""Tasks with several right answers: judged by perplexity and by choices, not by exact match."""


@dataclass(frozen=True)
class Item:
    """One conversation whose last turn is the answer to score.

    ``messages`` ends with the assistant turn; ``answer`` is its text, or its final number where the turn is a chain
    that ends in ``The answer is: N``. ``choices`` are four whole assistant turns, ``choices[gold]`` the right one.
    """

    task: str
    messages: list[dict[str, str]]
    answer: str
    choices: list[str] = field(default_factory=list)
    gold: int = 0


def split_of(key: str) -> str:
    """Split that a content key belongs to: ``heldout`` for one key in :data:`HELDOUT_SHARE`, else ``train``."""
    digest = hashlib.sha256(key.encode()).digest()
    return "heldout" if digest[0] % HELDOUT_SHARE == 0 else "train"


def generate(task: str, seed: int, split: str) -> Item:
    """Draw one item; the same arguments give the same item on every platform.

    Raises :class:`UserError` for an unknown task or split.
    """
    if task not in MAKERS:
        raise UserError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    while True:
        draft = MAKERS[task](rng)
        if (draft.split or split_of(f"{task}/{draft.key}")) == split:
            return _finish(task, draft, rng)


def _finish(task: str, draft: Draft, rng: random.Random) -> Item:
    right = draft.messages[-1]["content"]
    wrong = [text for text in dict.fromkeys(draft.wrong) if text != right]
    if len(wrong) < 3:
        raise AssertionError(f"task {task} offered {len(wrong)} wrong choices for {draft.key!r}")
    choices = [right, *rng.sample(wrong, 3)]
    rng.shuffle(choices)
    return Item(task, draft.messages, draft.answer or right, choices, choices.index(right))
