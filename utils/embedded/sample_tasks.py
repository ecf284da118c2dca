"""Instruction tasks of graded difficulty that a tiny language model can learn, and the sample data made of them.

Every item is a pure function of ``(task, split, seed)``. A hash of the item's content decides whether it belongs to
the ``train`` or the ``heldout`` split, so the two never share an input, however many items are drawn. The invented
facts are the exception: a fact belongs to both splits, its *phrasing* to one.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial

from router_tuning.embedded import sample_drafts as drafts
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
    "dialogue": drafts.dialogue,
    "story": drafts.story,
}
TASKS = tuple(MAKERS)

ALPACA = "alpaca"
FORMAT_OF_TASK = {
    "dialogue": "vicuna_sharegpt",
    "story": "evol_instruct",
    "compare": "slim_orca",
    "math": "meta_math_qa",
    "code": "evol_code_alpaca",
}
"""Raw format in which a task is published in ``data/sample/raw``; every other task is in :data:`ALPACA`."""

INPUT = "\nInput: "
"""What the Alpaca converter puts between an instruction and its input."""
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


def _turns(item: Item, **extra: object) -> list[dict[str, object]]:
    senders = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": senders[turn["role"]], "value": turn["content"], **extra} for turn in item.messages]


def _weighted(item: Item) -> dict[str, object]:
    weights = {"system": None, "human": 0.0, "gpt": 1.0}
    return {"conversations": [{**turn, "weight": weights[str(turn["from"])]} for turn in _turns(item)]}


def _alpaca(item: Item, _: int) -> dict[str, object]:
    instruction, _, data = item.messages[0]["content"].partition(INPUT)
    return {"instruction": instruction, "input": data, "output": item.messages[-1]["content"]}


def _pair(question: str, answer: str) -> Callable[[Item, int], dict[str, object]]:
    return lambda item, _: {question: item.messages[0]["content"], answer: item.messages[-1]["content"]}


RAW_FILES: dict[str, tuple[str, Callable[[Item, int], dict[str, object]]]] = {
    "vicuna_sharegpt": (
        "ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
        lambda item, number: {"id": f"sample_{number}", "conversations": _turns(item)},
    ),
    "evol_instruct": (
        "evol_instruct.jsonl",
        lambda item, number: {"idx": f"sample_{number}", "conversations": _turns(item)},
    ),
    "slim_orca": ("oo-labeled_correct.gpt4.sharegpt.jsonl", lambda item, _: _weighted(item)),
    "meta_math_qa": ("MetaMathQA-395K.jsonl", _pair("query", "response")),
    "evol_code_alpaca": ("train.jsonl", _pair("instruction", "output")),
    ALPACA: ("alpaca_data.json", _alpaca),
}
"""Per raw data set: its published file name, and how an item becomes a row of it."""

RAW_ROWS = {"vicuna_sharegpt": 800, ALPACA: 1600}
RAW_ROWS_ELSE = 400


def distinct_items(task: str, split: str, count: int, first_seed: int = 0) -> list[Item]:
    """``count`` items of a task with different prompts, from ``first_seed`` on; fewer after 20 ``count`` draws."""
    items: dict[str, Item] = {}
    for seed in range(first_seed, first_seed + 20 * count):
        item = generate(task, seed, split)
        items.setdefault(json.dumps(item.messages[:-1]), item)
        if len(items) == count:
            break
    return list(items.values())


def raw_text(name: str) -> str:
    """Text of a raw data set; a file ``*.json`` is one array, a file ``*.jsonl`` a row per line."""
    tasks = [task for task in TASKS if FORMAT_OF_TASK.get(task, ALPACA) == name]
    share = RAW_ROWS.get(name, RAW_ROWS_ELSE) // len(tasks)
    by_task = [distinct_items(task, "train", share) for task in tasks]
    items = [item for row in zip(*by_task, strict=True) for item in row]
    file_name, to_row = RAW_FILES[name]
    rows = [json.dumps(to_row(item, number)) for number, item in enumerate(items)]
    return "[\n" + ",\n".join(rows) + "\n]\n" if file_name.endswith(".json") else _lines(rows)


def heldout_text(task: str, count: int, first_seed: int = 0) -> str:
    """The held-out items of a task, ``{"task", "messages", "answer", "choices", "gold"}`` a line."""
    return _lines(json.dumps(asdict(item)) for item in distinct_items(task, "heldout", count, first_seed))


def _lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def sample_files(heldout_items: int, first_seed: int = 0) -> dict[str, Callable[[], str]]:
    """Every file of the sample data: its path under the root, and the function that makes its text."""
    files = {f"raw/{name}/{file}": partial(raw_text, name) for name, (file, _) in RAW_FILES.items()}
    held_out = {f"heldout/{task}.jsonl": partial(heldout_text, task, heldout_items, first_seed) for task in TASKS}
    return files | held_out
