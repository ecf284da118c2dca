"""Tasks on strings and numbers: one user turn (instruction and input), one short answer."""

from __future__ import annotations

import random

from utils.data.sample_tasks_draft import LETTERS, Draft, letters, misspelt, near_numbers, single


def _ask(rng: random.Random, instructions: tuple[str, ...], data: str) -> str:
    """The wording that the Alpaca converter gives an instruction with an input."""
    return f"{rng.choice(instructions)}\nInput: {data}"


def make_copy(rng: random.Random) -> Draft:
    """Say the letters again."""
    word = letters(rng, 3, 6)
    prompt = _ask(rng, ("Copy the text.", "Repeat the input.", "Write the same letters."), word)
    return single(word, prompt, word, misspelt(rng, word))


def make_reverse(rng: random.Random) -> Draft:
    """Say the letters backwards."""
    word = letters(rng, 3, 5)
    answer = word[::-1]
    prompt = _ask(rng, ("Reverse the text.", "Write the letters backwards."), word)
    return single(word, prompt, answer, [word, *misspelt(rng, answer)])


def make_sort(rng: random.Random) -> Draft:
    """Sort letters by the alphabet."""
    word = letters(rng, 3, 5)
    answer = "".join(sorted(word))
    prompt = _ask(rng, ("Sort the letters.", "Put the letters in order."), word)
    return single(word, prompt, answer, [word, *misspelt(rng, answer)])


def make_lookup(rng: random.Random) -> Draft:
    """Find the value that stands beside a key."""
    keys = rng.sample(LETTERS, 4)
    values = rng.sample(range(10, 100), len(keys))
    place = rng.randrange(len(keys))
    data = ", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True))
    asked = keys[place]
    prompt = _ask(rng, (f"What is the value of {asked}?", f"Find {asked} in the list."), data)
    wrong = [str(value) for value in values if value != values[place]]
    return single(f"{asked}?{data}", prompt, str(values[place]), wrong)


def make_count(rng: random.Random) -> Draft:
    """Count one letter in a string of two letters."""
    alphabet = rng.sample(LETTERS, 2)
    word = "".join(rng.choices(alphabet, k=rng.randint(3, 6)))
    asked = rng.choice(alphabet)
    answer = word.count(asked)
    prompt = _ask(rng, (f"Count the letter {asked}.", f"How many {asked} are there?"), word)
    wrong = [str(number) for number in range(max(0, answer - 2), answer + 4) if number != answer]
    return single(f"{asked}?{word}", prompt, str(answer), wrong)


def make_max(rng: random.Random) -> Draft:
    """Find the largest or the smallest of three two-digit numbers."""
    numbers = rng.sample(range(10, 100), 3)
    name, pick = rng.choice((("largest", max), ("smallest", min)))
    answer = pick(numbers)
    data = ", ".join(map(str, numbers))
    prompt = _ask(rng, (f"Find the {name} number.", f"Which number is the {name}?"), data)
    wrong = [str(number) for number in numbers if number != answer]
    return single(f"{name}?{data}", prompt, str(answer), [*wrong, *near_numbers(rng, answer)])


def make_add(rng: random.Random) -> Draft:
    """Add a number of one digit and one of two, in either order."""
    first, second = rng.sample((rng.randint(10, 99), rng.randint(1, 9)), 2)
    prompt = rng.choice((f"What is {first}+{second}?", f"Add {first} and {second}.", f"Compute {first}+{second}."))
    return single(f"{first}+{second}", prompt, str(first + second), near_numbers(rng, first + second))


MAKERS = {
    "copy": make_copy,
    "reverse": make_reverse,
    "sort": make_sort,
    "lookup": make_lookup,
    "count": make_count,
    "max": make_max,
    "add": make_add,
}
