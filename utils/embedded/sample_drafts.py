"""Tasks on letters, numbers, code, invented facts and running text: each function draws one question with its answer.

The order in which a function draws is part of the data: the files in git are what these functions give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

LETTERS = "ABCDEFGHIJKL"
COLOURS = ("red", "blue", "green", "black", "white", "pink", "gold", "grey")
ANIMALS = ("fox", "owl", "bear", "goat", "duck", "frog", "wolf", "hen")
PHRASINGS = 4
_STARTS = ("Ba", "Do", "Fe", "Ga", "Ki", "Lo", "Mu", "Na", "Ri", "Ta")
_ENDS = ("dor", "lan", "mir", "nia", "tos")
_FOOD = ("rice", "soup", "bread", "fish", "cake", "corn", "milk", "plum")
_RELATIONS = {"colour": COLOURS, "animal": ANIMALS, "food": _FOOD}
_NAMES = ("Ana", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Tom")
_THINGS = ("pens", "books", "cards", "shells", "coins", "apples")
PEOPLE = ("Ana", "Ben", "Eva", "Gus", "Ian", "Kim", "Leo", "Mia", "Nora", "Otto", "Pia", "Tom")
TREASURES = ("key", "ring", "map", "lamp", "book", "bell", "coin", "hat")
PLACES = ("lake", "hill", "barn", "well", "mill", "cave", "road", "tree")
MOODS = ("happy", "tired", "proud", "glad")
WEATHER = ("sun", "rain", "snow", "wind", "fog")
HERO = {"name": PEOPLE, "colour": COLOURS, "animal": ANIMALS, "thing": TREASURES}


Maker = Callable[[random.Random], "Draft"]


@dataclass(frozen=True)
class Draft:
    """A conversation with its content named by ``key``, whatever the phrasing; ``key`` decides the split.

    ``answer`` is what exact match compares (the last turn if empty); ``split`` fixes the split instead of the key.
    """

    key: str
    messages: list[dict[str, str]]
    wrong: Sequence[str]
    answer: str = ""
    split: str = ""


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other, behind a system message if there is one."""
    turns = [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def letters(rng: random.Random, low: int, high: int) -> str:
    """``low`` to ``high`` different letters in random order."""
    return "".join(rng.sample(LETTERS, rng.randint(low, high)))


def misspelt(rng: random.Random, word: str) -> list[str]:
    """Five strings that differ from ``word`` by a swap, a change, a drop, a repeat and an insertion."""
    place = rng.randrange(len(word))
    other = rng.choice([letter for letter in LETTERS if letter != word[place]])
    swapped, before, after = list(word), word[:place], word[place + 1 :]
    swapped[place], swapped[place - 1] = swapped[place - 1], swapped[place]
    return ["".join(swapped), before + other + after, before + after, before + word[place] + word[place:],
            before + other + word[place:]]  # fmt: skip


def near_numbers(rng: random.Random, value: int) -> list[str]:
    """Wrong numbers that look right: off by one, by ten, and by a random small step."""
    steps = [1, -1, 10, -10, 2, -2, rng.randint(3, 9), -rng.randint(3, 9)]
    return [str(value + step) for step in steps if value + step >= 0]


def _instruct(
    rng: random.Random, instructions: Sequence[str], data: str, answer: str, wrong: Callable[[], list[str]], about=""
) -> Draft:
    """One question in the wording that the Alpaca converter gives an instruction with an input."""
    prompt = f"{rng.choice(instructions)}\nInput: {data}"
    return Draft(about + data, talk(prompt, answer), wrong())


def _on_letters(asked: Sequence[str], low: int, high: int, solve: Callable[[str], str]) -> Maker:
    """Tasks that make other letters of ``low`` to ``high`` different ones."""

    def make(rng: random.Random) -> Draft:
        word = letters(rng, low, high)
        return _instruct(rng, asked, word, solve(word), lambda: [word, *misspelt(rng, solve(word))])

    return make


def lookup(rng: random.Random) -> Draft:
    """Find the entry that begins with a letter."""
    keys = rng.sample(LETTERS, 4)
    values = rng.sample(range(10, 100), len(keys))
    place = rng.randrange(len(keys))
    key, entries = keys[place], [f"{key}{value}" for key, value in zip(keys, values, strict=True)]
    asked = (f"Which entry begins with {key}?", f"Find {key} in the list.")
    wrong = [*(f"{key}{value}" for value in values), *entries]
    return _instruct(rng, asked, ", ".join(entries), entries[place], lambda: wrong, f"{key}?")


def count(rng: random.Random) -> Draft:
    """Count the letter A in a string of two letters."""
    word = "".join(rng.choices(("A", rng.choice(LETTERS[1:])), k=rng.randint(3, 7)))
    answer = word.count("A")
    wrong = [str(number) for number in range(max(0, answer - 2), answer + 4)]
    return _instruct(rng, ("Count the letter A.", "How many A are there?"), word, str(answer), lambda: wrong)


def extreme(rng: random.Random) -> Draft:
    """Find the largest or the smallest of three two-digit numbers."""
    numbers = rng.sample(range(10, 100), 3)
    name, pick = rng.choice((("largest", max), ("smallest", min)))
    answer = pick(numbers)
    others = [str(number) for number in numbers if number != answer]
    asked, data = (f"Find the {name} number.", f"Which number is the {name}?"), ", ".join(map(str, numbers))
    return _instruct(rng, asked, data, str(answer), lambda: [*others, *near_numbers(rng, answer)], f"{name}?")


def add(rng: random.Random) -> Draft:
    """Add a number of one digit and one of two, in either order."""
    first, second = rng.sample((rng.randint(10, 99), rng.randint(1, 9)), 2)
    prompt = rng.choice((f"What is {first}+{second}?", f"Add {first} and {second}.", f"Compute {first}+{second}."))
    return Draft(f"{first}+{second}", talk(prompt, str(first + second)), near_numbers(rng, first + second))


@cache
def facts() -> dict[tuple[str, str], str]:
    """The 150 invented facts, ``{(country, relation): value}``; the same in every run and on every platform."""
    rng = random.Random("facts")
    countries = [start + end for start in _STARTS for end in _ENDS]
    return {(country, name): rng.choice(values) for country in countries for name, values in _RELATIONS.items()}


def fact(rng: random.Random) -> Draft:
    """Recall an invented fact; of its four phrasings one, another for each fact, is only ever held out."""
    known = facts()
    number = rng.randrange(len(known))
    (country, name), value = list(known.items())[number]
    phrasing = rng.randrange(PHRASINGS)
    questions = (f"What is the {name} of {country}?", f"Name the {name} of {country}.",
                 f"Which {name} does {country} have?", f"Tell me the {name} of {country}.")  # fmt: skip
    held_out = phrasing == (number // len(_RELATIONS) + number) % PHRASINGS
    wrong = [other for other in _RELATIONS[name] if other != value]
    split = "heldout" if held_out else "train"
    return Draft(f"{country}/{name}/{phrasing}", talk(questions[phrasing], value), wrong, split=split)


def compare(rng: random.Random) -> Draft:
    """Compare two numbers or letters; the system message asks for a word or for a reason."""
    if rng.random() < 0.7:
        first, second = map(str, rng.sample(range(10, 100), 2))
        word, other, pick = rng.choice((("larger", "smaller", max), ("smaller", "larger", min)))
        wrong = near_numbers(rng, int(second))
    else:
        first, second = rng.sample(LETTERS, 2)
        word, other, pick = rng.choice((("earlier", "later", min), ("later", "earlier", max)))
        wrong = [letter for letter in LETTERS if letter not in (first, second)]
    right = pick(first, second)
    left = second if right == first else first
    if rng.random() < 0.5:
        system, answer, wrong = "Answer with one word.", right, [left, *wrong]
    else:
        system, answer = "Explain your answer.", f"{right} is {word} than {left}."
        wrong = [f"{left} is {word} than {right}.", f"{right} is {other} than {left}.",
                 f"{left} is {other} than {left}."]  # fmt: skip
    messages = talk(f"Which is {word}, {first} or {second}?", answer, system=system)
    return Draft(f"{word}/{first}/{second}", messages, wrong)


def math(rng: random.Random) -> Draft:
    """Solve a word problem in two steps, the chain written out; ends in ``The answer is: N``."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    if rng.random() < 0.6:
        has, more, less = rng.randint(10, 60), rng.randint(2, 9), rng.randint(2, 9)
        result = has + more - less
        story = f"{name} has {has} {thing}, buys {more} and loses {less}."
        steps = f"{has}+{more}={has + more}. {has + more}-{less}="
    else:
        boxes, each, more = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
        result = boxes * each + more
        story = f"{name} has {boxes} boxes of {each} {thing} and {more} more."
        steps = f"{boxes}*{each}={boxes * each}. {boxes * each}+{more}="
    right, *wrong = [f"{steps}{v}. The answer is: {v}" for v in (result, *near_numbers(rng, result))]
    messages = talk(f"{story} How many {thing} does {name} have?", right)
    return Draft(f"{steps}{result}", messages, wrong, answer=str(result))


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


def code(rng: random.Random) -> Draft:
    """Tell what a small Python program prints, or write a function of one line."""
    if rng.random() < 0.7:
        program, answer, wrong = _code_to_run(rng)
        return Draft(program, talk(f"What does this code print?\n{program}", answer), wrong)
    number, second = rng.randint(2, 20), rng.randint(2, 20)
    verb, sign = rng.choice((("adds", "+"), ("subtracts", "-")))
    prompt = f"Write a function f that multiplies x by {number} and {verb} {second}."
    body, other = "def f(x):\n    return x*{}{}{}".format, {"+": "-", "-": "+"}[sign]
    wrong = [body(number + 1, sign, second), body(number, other, second), body(number, sign, second + 1)]
    return Draft(f"{number}{sign}{second}", talk(prompt, body(number, sign, second)), wrong)


def _recall(rng: random.Random) -> Draft:
    """A person says three things about himself and asks for two of them."""
    pools = {"name": PEOPLE, "colour": COLOURS, "animal": ANIMALS}
    told = {about: rng.choice(pool) for about, pool in pools.items()}
    opening = " ".join(f"My {about} is {told[about]}." for about in rng.sample(sorted(told), 3))
    first, last = rng.sample(sorted(told), 2)
    answers = {about: f"Your {about} is {told[about]}." for about in told}
    messages = talk(opening, "Hello.", f"What is my {first}?", answers[first], f"What is my {last}?", answers[last])
    wrong = [f"Your {last} is {other}." for other in pools[last] if other != told[last]]
    return Draft("/".join(told.values()), messages, wrong)


def _code_word(rng: random.Random) -> Draft:
    """A word to remember, to repeat and to say backwards."""
    word = letters(rng, 3, 4)
    first, last = rng.sample((("Say the word.", word), ("Say it backwards.", word[::-1])), 2)
    messages = talk(f"Remember the word {word}.", "Yes.", *first, *last)
    return Draft(word, messages, [first[1] + first[1][0], *misspelt(rng, last[1])])


def _ledger(rng: random.Random) -> Draft:
    """A number that changes twice."""
    has, more, less = rng.randint(10, 60), rng.randint(2, 9), rng.randint(2, 9)
    say, end = "You have {}.".format, has + more - less
    messages = talk(f"I have {has} coins.", say(has), f"I get {more}.", say(has + more), f"I lose {less}.", say(end))
    return Draft(f"{has}+{more}-{less}", messages, [say(value) for value in near_numbers(rng, end)])


def dialogue(rng: random.Random) -> Draft:
    """Three user turns; the last answer needs an earlier turn."""
    return rng.choice((_recall, _code_word, _ledger))(rng)


_STORY = (
    "{name} was a {colour} {animal}. One day {name} lost a {thing}. There was {weather} near the {place}, but "
    '{name} met a {helper}. The {helper} said: "Your {thing} is in the {where}." So {name} went to the {where} '
    "and found the {thing}. {name} and the {helper} were {mood}."
)


def story(rng: random.Random) -> Draft:
    """A short story about a given hero; the rest is free, so it is judged as running text."""
    hero = {part: rng.choice(pool) for part, pool in HERO.items()}
    place, where = rng.sample(PLACES, 2)
    helper = rng.choice([animal for animal in ANIMALS if animal != hero["animal"]])
    mood, weather = rng.choice(MOODS), rng.choice(WEATHER)
    told = partial(_STORY.format, place=place, where=where, helper=helper, mood=mood, weather=weather)
    prompt = "Write a story about {name}, a {colour} {animal}, and a {thing}.".format(**hero)
    others = {part: [word for word in pool if word not in (hero[part], helper)] for part, pool in HERO.items()}
    wrong = [told(**{**hero, part: rng.choice(pool)}) for part, pool in others.items()]
    return Draft("/".join(hero.values()), talk(prompt, told(**hero)), wrong)


MAKERS: dict[str, Maker] = {
    "copy": _on_letters(("Copy the text.", "Repeat the input.", "Write the same letters."), 3, 6, str),
    "reverse": _on_letters(("Reverse the text.", "Write the letters backwards."), 3, 5, lambda word: word[::-1]),
    "sort": _on_letters(("Sort the letters.", "Put the letters in order."), 3, 5, lambda word: "".join(sorted(word))),
    "lookup": lookup,
    "count": count,
    "max": extreme,
    "add": add,
    "fact": fact,
    "compare": compare,
    "math": math,
    "code": code,
    "dialogue": dialogue,
    "story": story,
}
"""Per task, what draws a question of it."""
