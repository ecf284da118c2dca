"""The generator: right answers by an independent reading of the prompt, disjoint splits, four distinct choices."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import subprocess
import sys

import pytest

from router_tuning.embedded.sample_tasks import (
    FORMAT_OF_TASK,
    FREE_TASKS,
    TASKS,
    Item,
    final_answer,
    generate,
)
from router_tuning.embedded.sample_tasks_worlds import facts
from router_tuning.errors import UserError

COUNT = 300


def prompt(item: Item) -> str:
    return item.messages[-2]["content"]


def data(item: Item) -> str:
    return prompt(item).partition("\nInput: ")[2]


def solve_lookup(item: Item) -> str:
    asked = re.search(r"(?:with|Find) ([A-Z])\b", prompt(item))[1]
    return next(entry for entry in data(item).split(", ") if entry.startswith(asked))


def solve_count(item: Item) -> str:
    return str(data(item).count("A"))


def solve_max(item: Item) -> str:
    numbers = [int(number) for number in data(item).split(", ")]
    return str(max(numbers) if "largest" in prompt(item) else min(numbers))


def solve_add(item: Item) -> str:
    return str(sum(map(int, re.findall(r"\d+", prompt(item)))))


def solve_fact(item: Item) -> str:
    relation = re.search(r"colour|animal|food", prompt(item))[0]
    country = re.search(r"\b(?!What|Name|Which|Tell)[A-Z][a-z]+", prompt(item))[0]
    return facts()[country, relation]


def solve_compare(item: Item) -> str:
    word, first, second = re.fullmatch(r"Which is (\w+), (\w+) or (\w+)\?", prompt(item)).groups()
    low, high = sorted((first, second))
    right, left = (high, low) if word in ("larger", "later") else (low, high)
    return right if item.messages[0]["content"] == "Answer with one word." else f"{right} is {word} than {left}."


def solve_math(item: Item) -> str:
    numbers = list(map(int, re.findall(r"\d+", prompt(item))))
    return str(
        numbers[0] * numbers[1] + numbers[2] if "boxes" in prompt(item) else numbers[0] + numbers[1] - numbers[2]
    )


def solve_code(item: Item) -> str:
    if prompt(item).startswith("What does"):
        program = prompt(item).partition("\n")[2]
        ast.parse(program)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(program, {})
        return printed.getvalue().strip()
    factor, verb, second = re.fullmatch(r".*multiplies x by (\d+) and (\w+) (\d+)\.", prompt(item)).groups()
    names: dict = {}
    exec(item.answer, names)
    sign = {"adds": 1, "subtracts": -1}[verb]
    assert all(names["f"](x) == x * int(factor) + sign * int(second) for x in range(5))
    return item.answer


def solve_dialogue(item: Item) -> str:
    opening, last = item.messages[0]["content"], prompt(item)
    if opening.startswith("My"):
        told = dict(re.findall(r"My (\w+) is (\w+)\.", opening))
        asked = re.fullmatch(r"What is my (\w+)\?", last)[1]
        return f"Your {asked} is {told[asked]}."
    if opening.startswith("Remember"):
        word = opening.split()[-1].rstrip(".")
        return word[::-1] if "backwards" in last else word
    has, more, less = (int(re.search(r"\d+", item.messages[turn]["content"])[0]) for turn in (0, 2, 4))
    return f"You have {has + more - less}."


SOLVERS = {
    "copy": data,
    "reverse": lambda item: data(item)[::-1],
    "sort": lambda item: "".join(sorted(data(item))),
    "lookup": solve_lookup,
    "count": solve_count,
    "max": solve_max,
    "add": solve_add,
    "fact": solve_fact,
    "compare": solve_compare,
    "math": solve_math,
    "code": solve_code,
    "dialogue": solve_dialogue,
}


def test_every_task_is_solved_or_free():
    assert set(SOLVERS) | set(FREE_TASKS) == set(TASKS) and len(TASKS) >= 10
    assert set(FORMAT_OF_TASK) <= set(TASKS)


@pytest.mark.parametrize("task", sorted(SOLVERS))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_right(task: str, split: str):
    for seed in range(COUNT):
        item = generate(task, seed, split)
        assert item.answer == SOLVERS[task](item), item
        assert final_answer(item.messages[-1]["content"]) == item.answer


def test_earlier_turns_of_a_ledger_are_right():
    ledgers = [item for item in (generate("dialogue", seed, "train") for seed in range(60)) if len(item.messages) == 6]
    ledgers = [item for item in ledgers if item.messages[0]["content"].startswith("I have")]
    assert ledgers
    for item in ledgers:
        numbers = [int(re.search(r"\d+", turn["content"])[0]) for turn in item.messages]
        assert numbers[1] == numbers[0] and numbers[3] == numbers[0] + numbers[2]


@pytest.mark.parametrize("task", TASKS)
def test_choices_are_four_different_turns_and_gold_is_right(task: str):
    golds = set()
    for seed in range(COUNT):
        item = generate(task, seed, "heldout")
        assert len(set(item.choices)) == 4
        assert item.choices[item.gold] == item.messages[-1]["content"]
        golds.add(item.gold)
    assert golds == {0, 1, 2, 3}


@pytest.mark.parametrize("task", TASKS)
def test_splits_never_share_a_prompt(task: str):
    def prompts(split: str) -> set[str]:
        return {json.dumps(generate(task, seed, split).messages[:-1]) for seed in range(5 * COUNT)}

    assert not prompts("train") & prompts("heldout")


def test_every_held_out_fact_is_taught_in_other_words():
    taught = {prompt(generate("fact", seed, "train")) for seed in range(4000)}
    asked = {prompt(generate("fact", seed, "heldout")) for seed in range(2000)}
    assert len(facts()) == len(asked) == 150 and len(taught) == 450


def test_items_do_not_depend_on_the_process():
    """Python randomises ``hash`` per process; nothing here may depend on it."""
    code = "from router_tuning.embedded.sample_tasks import *\n"
    code += "print([generate(t, s, 'train') for t in TASKS for s in range(5)])"
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    ).stdout
    assert printed.strip() == str([generate(task, seed, "train") for task in TASKS for seed in range(5)])


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown task 'sorting'; choose from copy"):
        generate("sorting", 0, "train")
    with pytest.raises(UserError, match="unknown split 'test'"):
        generate("sort", 0, "test")
