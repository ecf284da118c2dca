"""Tasks with a small world behind them: invented facts, comparison under a system prompt, word problems, code."""

from __future__ import annotations

import random
from functools import cache

from router_tuning.embedded.sample_tasks_draft import LETTERS, Draft, letters, misspelt, near_numbers, single, turn

COUNTRIES = 50
PHRASINGS = 4
_STARTS = ("Ba", "Do", "Fe", "Ga", "Ki", "Lo", "Mu", "Na", "Ri", "Ta")
_ENDS = ("dor", "lan", "mir", "nia", "tos")
_RELATIONS = {
    "colour": ("red", "blue", "green", "black", "white", "pink", "gold", "grey"),
    "animal": ("fox", "owl", "bear", "goat", "duck", "frog", "wolf", "hen"),
    "food": ("rice", "soup", "bread", "fish", "cake", "corn", "milk", "plum"),
}
_BRIEF = "Answer with one word."
_EXPLAIN = "Explain your answer."
_NAMES = ("Ana", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Tom")
_THINGS = ("pens", "books", "cards", "shells", "coins", "apples")


@cache
def facts() -> dict[tuple[str, str], str]:
    """The 150 invented facts, ``{(country, relation): value}``; the same in every run and on every platform."""
    rng = random.Random("facts")
    countries = [start + end for start in _STARTS for end in _ENDS][:COUNTRIES]
    return {
        (country, relation): rng.choice(values) for country in countries for relation, values in _RELATIONS.items()
    }


def _fact_question(country: str, relation: str, phrasing: int) -> str:
    return (
        f"What is the {relation} of {country}?",
        f"Name the {relation} of {country}.",
        f"Which {relation} does {country} have?",
        f"Tell me the {relation} of {country}.",
    )[phrasing]


def make_fact(rng: random.Random) -> Draft:
    """Recall an invented fact; of its four phrasings one, another for each fact, is only ever held out."""
    known = facts()
    number = rng.randrange(len(known))
    (country, relation), value = list(known.items())[number]
    phrasing = rng.randrange(PHRASINGS)
    held_out = phrasing == (number // len(_RELATIONS) + number) % PHRASINGS
    wrong = [other for other in _RELATIONS[relation] if other != value]
    draft = single(f"{country}/{relation}/{phrasing}", _fact_question(country, relation, phrasing), value, wrong)
    return Draft(draft.key, draft.messages, draft.wrong, split="heldout" if held_out else "train")


def make_compare(rng: random.Random) -> Draft:
    """Compare two numbers or letters; the system message asks for a word or for a reason."""
    if rng.random() < 0.7:
        first, second = map(str, rng.sample(range(10, 100), 2))
        word, other, pick = rng.choice((("larger", "smaller", max), ("smaller", "larger", min)))
        wrong_word = near_numbers(rng, int(second))
    else:
        first, second = rng.sample(LETTERS, 2)
        word, other, pick = rng.choice((("earlier", "later", min), ("later", "earlier", max)))
        wrong_word = [letter for letter in LETTERS if letter not in (first, second)]
    right = pick(first, second)
    left = second if right == first else first
    question = f"Which is {word}, {first} or {second}?"
    if rng.random() < 0.5:
        system, answer, wrong = _BRIEF, right, [left, *wrong_word]
    else:
        system, answer = _EXPLAIN, f"{right} is {word} than {left}."
        wrong = [
            f"{left} is {word} than {right}.",
            f"{right} is {other} than {left}.",
            f"{left} is {other} than {left}.",
        ]
    messages = [turn("system", system), turn("user", question), turn("assistant", answer)]
    return Draft(f"{word}/{first}/{second}", messages, wrong)


def make_math(rng: random.Random) -> Draft:
    """Solve a word problem in two steps, the chain written out; ends in ``The answer is: N``."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    if rng.random() < 0.6:
        has, more, less = rng.randint(10, 60), rng.randint(2, 9), rng.randint(2, 9)
        middle = has + more
        result = middle - less
        story = f"{name} has {has} {thing}, buys {more} and loses {less}."
        steps = f"{has}+{more}={middle}. {middle}-{less}="
    else:
        boxes, each, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
        middle = boxes * each
        result = middle + more
        story = f"{name} has {boxes} boxes of {each} {thing} and {more} more."
        steps = f"{boxes}*{each}={middle}. {middle}+{more}="
    question = f"{story} How many {thing} does {name} have?"
    chains = [f"{steps}{value}. The answer is: {value}" for value in (result, *near_numbers(rng, result))]
    messages = [turn("user", question), turn("assistant", chains[0])]
    return Draft(f"{steps}{result}", messages, chains[1:], answer=str(result))


def _code_to_run(rng: random.Random) -> tuple[str, str, list[str]]:
    kind = rng.choice(("index", "add", "function", "reverse", "length"))
    if kind == "index":
        values = rng.sample(range(10, 100), 3)
        place = rng.randrange(3)
        wrong = [*map(str, values), *near_numbers(rng, values[place])]
        return f"x = {values}\nprint(x[{place}])", str(values[place]), wrong
    if kind == "add":
        first, second = rng.randint(10, 90), rng.randint(2, 9)
        return f"x = {first}\nprint(x+{second})", str(first + second), near_numbers(rng, first + second)
    if kind == "function":
        factor, more, x = rng.randint(2, 5), rng.randint(1, 9), rng.randint(2, 9)
        result = factor * x + more
        return f"def f(x):\n    return x*{factor}+{more}\nprint(f({x}))", str(result), near_numbers(rng, result)
    word = letters(rng, 3, 4)
    if kind == "reverse":
        return f'print("{word}"[::-1])', word[::-1], [word, *misspelt(rng, word[::-1])]
    word = letters(rng, 2, 6)
    return f'print(len("{word}"))', str(len(word)), near_numbers(rng, len(word))


def make_code(rng: random.Random) -> Draft:
    """Tell what a small Python program prints, or write a function of one line."""
    if rng.random() < 0.7:
        program, answer, wrong = _code_to_run(rng)
        return single(program, f"What does this code print?\n{program}", answer, wrong)
    number, second = rng.randint(2, 20), rng.randint(2, 20)
    verb, sign = rng.choice((("adds", "+"), ("subtracts", "-")))
    prompt = f"Write a function f that multiplies x by {number} and {verb} {second}."
    signs = {"+": "-", "-": "+"}
    body = "def f(x):\n    return x*{}{}{}"
    wrong = [
        body.format(number + 1, sign, second),
        body.format(number, signs[sign], second),
        body.format(number, sign, second + 1),
    ]
    return single(f"{number}{sign}{second}", prompt, body.format(number, sign, second), wrong)


MAKERS = {"fact": make_fact, "compare": make_compare, "math": make_math, "code": make_code}
