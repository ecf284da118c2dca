"""Tasks on strings and numbers: one user turn (instruction and input), one short answer."""

from __future__ import annotations

import random

from router_tuning.embedded.sample_tasks_draft import LETTERS, Draft, letters, misspelt, near_numbers, single


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
    """Find the entry that begins with a letter."""
    keys = rng.sample(LETTERS, 4)
    values = rng.sample(range(10, 100), len(keys))
    asked = rng.randrange(len(keys))
    entries = [f"{key}{value}" for key, value in zip(keys, values, strict=True)]
    data = ", ".join(entries)
    prompt = _ask(rng, (f"Which entry begins with {keys[asked]}?", f"Find {keys[asked]} in the list."), data)
    wrong = [f"{keys[asked]}{value}" for value in values]
    return single(f"{keys[asked]}?{data}", prompt, entries[asked], [*wrong, *entries])


def make_count(rng: random.Random) -> Draft:
    """Count the letter A in a string of two letters."""
    word = "".join(rng.choices(("A", rng.choice(LETTERS[1:])), k=rng.randint(3, 7)))
    answer = word.count("A")
    prompt = _ask(rng, ("Count the letter A.", "How many A are there?"), word)
    wrong = [str(number) for number in range(max(0, answer - 2), answer + 4)]
    return single(word, prompt, str(answer), wrong)


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
