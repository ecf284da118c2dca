"""Sample data: right answers by an independent reading of the prompt, disjoint splits, the same bytes as in git."""

import contextlib
import io
import itertools
import json
import re

import pytest

from router_tuning.embedded.sample_drafts import facts
from router_tuning.embedded.sample_tasks import FREE_TASKS, TASKS, Item, distinct_items, generate, sample_files

COUNT = 500


def prompt(item: Item) -> str:
    return item.messages[-2]["content"]


def data(item: Item) -> str:
    return prompt(item).partition("\nInput: ")[2]


def numbers(text: str) -> list[int]:
    return list(map(int, re.findall(r"\d+", text)))


def solve_fact(item: Item) -> str:
    relation = re.search(r"colour|animal|food", prompt(item))[0]
    return facts()[re.search(r"\b(?!What|Name|Which|Tell)[A-Z][a-z]+", prompt(item))[0], relation]


def solve_compare(item: Item) -> str:
    word, *both = re.fullmatch(r"Which is (\w+), (\w+) or (\w+)\?", prompt(item)).groups()
    right, left = sorted(both, reverse=word in ("larger", "later"))
    return right if item.messages[0]["content"] == "Answer with one word." else f"{right} is {word} than {left}."


def solve_math(item: Item) -> str:
    first, second, third = numbers(prompt(item))
    return str(first * second + third if "boxes" in prompt(item) else first + second - third)


def solve_code(item: Item) -> str:
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(prompt(item).partition("\n")[2] or item.answer, names)
    if printed.getvalue():
        return printed.getvalue().strip()
    factor, second = numbers(prompt(item))
    sign = 1 if "adds" in prompt(item) else -1
    return item.answer if all(names["f"](x) == x * factor + sign * second for x in range(5)) else "another function"


def solve_dialogue(item: Item) -> str:
    opening, last = item.messages[0]["content"], prompt(item)
    if opening.startswith("My"):
        told, asked = dict(re.findall(r"My (\w+) is (\w+)\.", opening)), re.search(r"(\w+)\?", last)[1]
        return f"Your {asked} is {told[asked]}."
    if opening.startswith("Remember"):
        word = opening.split()[-1].rstrip(".")
        return word[::-1] if "backwards" in last else word
    has, more, less = numbers(" ".join(turn["content"] for turn in item.messages if turn["role"] == "user"))
    return f"You have {has + more - less}."


SOLVERS = {
    "copy": data,
    "reverse": lambda item: data(item)[::-1],
    "sort": lambda item: "".join(sorted(data(item))),
    "lookup": lambda item: re.search(rf"\b{re.search(r'(?:with|Find) ([A-Z])', prompt(item))[1]}\d+", data(item))[0],
    "count": lambda item: str(data(item).count("A")),
    "max": lambda item: str((max if "largest" in prompt(item) else min)(numbers(data(item)))),
    "add": lambda item: str(sum(numbers(prompt(item)))),
    "fact": solve_fact,
    "compare": solve_compare,
    "math": solve_math,
    "code": solve_code,
    "dialogue": solve_dialogue,
}


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right_and_splits_share_no_prompt(task):
    """Four choices, one of them right, in any place; free tasks have several right answers."""
    assert (task in SOLVERS) != (task in FREE_TASKS)
    items = {split: [generate(task, seed, split) for seed in range(COUNT)] for split in ("train", "heldout")}
    for item in itertools.chain(*items.values()):
        assert task in FREE_TASKS or item.answer == SOLVERS[task](item), item
        assert item.messages[-1]["content"].rpartition("The answer is:")[2].strip() == item.answer
        assert len(set(item.choices)) == 4 and item.choices[item.gold] == item.messages[-1]["content"]
    assert {item.gold for item in items["heldout"]} == {0, 1, 2, 3}
    asked = {split: {json.dumps(item.messages[:-1]) for item in found} for split, found in items.items()}
    assert not asked["train"] & asked["heldout"]


def test_every_held_out_fact_is_taught_in_other_words():
    taught = {prompt(generate("fact", seed, "train")) for seed in range(4000)}
    asked = {prompt(generate("fact", seed, "heldout")) for seed in range(2000)}
    assert len(facts()) == len(asked) == 150 and len(taught) == 450


@pytest.mark.parametrize("relative", sorted(sample_files(128)))
def test_committed_file_equals_the_regenerated_one(relative, root):
    text = (root / "data/sample" / relative).read_text(encoding="utf-8")
    assert text == sample_files(128)[relative]()
    if relative.startswith("heldout"):
        items = [Item(**json.loads(line)) for line in text.splitlines()]
        trained = {json.dumps(item.messages[:-1]) for item in distinct_items(items[0].task, "train", 400)}
        asked = {json.dumps(item.messages[:-1]) for item in items}
        assert len(asked) == 128 and not asked & trained


def test_the_command_writes_these_files_and_refuses_nonsense(tmp_path, root, command):
    assert command("data/make_sample_data.py", "--save_path", tmp_path, "--heldout_items", 3) == 0
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {name: make() for name, make in sample_files(3).items()}
    assert set(found) == {str(p.relative_to(root / "data/sample")) for p in (root / "data/sample").rglob("*.json*")}
    assert command("data/make_sample_data.py", "--save_path", tmp_path, "--heldout_items", 0) == 2
