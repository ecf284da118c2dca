"""Instruction tasks of graded difficulty that a tiny language model can learn, and the sample data made of them.

Every item is a pure function of ``(task, split, seed)``. A hash of the item's content decides whether it belongs to
the ``train`` or the ``heldout`` split, so the two never share an input, however many items are drawn. The invented
facts are the exception: a fact belongs to both splits, its *phrasing* to one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

from router_tuning.embedded.sample_drafts import MAKERS

HELDOUT_SHARE = 8
"""One content in this many is held out."""
TASKS = tuple(MAKERS)
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
    """Draw one item of a task of :data:`TASKS`; the same arguments give the same item on every platform.

    Args:
        split: ``train`` or ``heldout``.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}")
    rng = random.Random(f"{task}/{split}/{seed}")
    draft = MAKERS[task](rng)
    while (draft.split or split_of(f"{task}/{draft.key}")) != split:
        draft = MAKERS[task](rng)
    right = draft.messages[-1]["content"]
    wrong = [text for text in dict.fromkeys(draft.wrong) if text != right]
    choices = [right, *rng.sample(wrong, 3)]
    rng.shuffle(choices)
    return Item(task, draft.messages, draft.answer or right, choices, choices.index(right))


def _turns(item: Item) -> list[dict[str, object]]:
    senders = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": senders[turn["role"]], "value": turn["content"]} for turn in item.messages]


def _weighted(item: Item, _: int) -> dict[str, object]:
    weights = {"system": None, "human": 0.0, "gpt": 1.0}
    return {"conversations": [{**turn, "weight": weights[str(turn["from"])]} for turn in _turns(item)]}


def _alpaca(item: Item, _: int) -> dict[str, object]:
    instruction, _, data = item.messages[0]["content"].partition(INPUT)
    return {"instruction": instruction, "input": data, "output": item.messages[-1]["content"]}


def _conversation(number_key: str) -> Callable[[Item, int], dict[str, object]]:
    return lambda item, number: {number_key: f"sample_{number}", "conversations": _turns(item)}


def _pair(question: str, answer: str) -> Callable[[Item, int], dict[str, object]]:
    return lambda item, _: {question: item.messages[0]["content"], answer: item.messages[-1]["content"]}


RAW_FILES: dict[str, tuple[Sequence[str], int, Callable[[Item, int], dict[str, object]]]] = {
    "vicuna_sharegpt/ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json": (
        ("dialogue",),
        800,
        _conversation("id"),
    ),
    "evol_instruct/evol_instruct.jsonl": (("story",), 400, _conversation("idx")),
    "slim_orca/oo-labeled_correct.gpt4.sharegpt.jsonl": (("compare",), 400, _weighted),
    "meta_math_qa/MetaMathQA-395K.jsonl": (("math",), 400, _pair("query", "response")),
    "evol_code_alpaca/train.jsonl": (("code",), 400, _pair("instruction", "output")),
    "alpaca/alpaca_data.json": (TASKS[:8], 1600, _alpaca),
}
"""Per file of ``data/sample/raw``: the tasks that are published in it, its rows, and how an item becomes one."""


def distinct_items(task: str, split: str, count: int, first_seed: int = 0) -> list[Item]:
    """``count`` items of a task with different prompts, from ``first_seed`` on; fewer after 20 ``count`` draws."""
    items: dict[str, Item] = {}
    for seed in range(first_seed, first_seed + 20 * count):
        item = generate(task, seed, split)
        items.setdefault(json.dumps(item.messages[:-1]), item)
        if len(items) == count:
            break
    return list(items.values())


def raw_text(file: str) -> str:
    """Text of a raw data set; a file ``*.json`` is one array, a file ``*.jsonl`` a row per line."""
    tasks, rows, to_row = RAW_FILES[file]
    by_task = [distinct_items(task, "train", rows // len(tasks)) for task in tasks]
    items = itertools.chain.from_iterable(zip(*by_task, strict=True))
    texts = [json.dumps(to_row(item, number)) for number, item in enumerate(items)]
    return "[\n" + ",\n".join(texts) + "\n]\n" if file.endswith(".json") else _lines(texts)


def heldout_text(task: str, count: int, first_seed: int = 0) -> str:
    """The held-out items of a task, ``{"task", "messages", "answer", "choices", "gold"}`` a line."""
    return _lines(json.dumps(asdict(item)) for item in distinct_items(task, "heldout", count, first_seed))


def _lines(rows: Iterable[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def sample_files(heldout_items: int, first_seed: int = 0) -> dict[str, Callable[[], str]]:
    """Every file of the sample data: its path under the root, and the function that makes its text."""
    files = {f"raw/{file}": partial(raw_text, file) for file in RAW_FILES}
    held_out = {f"heldout/{task}.jsonl": partial(heldout_text, task, heldout_items, first_seed) for task in TASKS}
    return files | held_out
