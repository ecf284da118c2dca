"""What a task maker returns, and small things that several makers share."""

from __future__ import annotations

import random
from dataclasses import dataclass

LETTERS = "ABCDEFGHIJKL"


@dataclass(frozen=True)
class Draft:
    """A conversation with its content named by ``key``, whatever the phrasing; ``key`` decides the split.

    ``answer`` is what exact match compares (the last turn if empty); ``split`` fixes the split instead of the key.
    """

    key: str
    messages: list[dict[str, str]]
    wrong: list[str]
    answer: str = ""
    split: str = ""


def turn(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def single(key: str, prompt: str, answer: str, wrong: list[str]) -> Draft:
    """A conversation of one question and one answer."""
    return Draft(key, [turn("user", prompt), turn("assistant", answer)], wrong)


def letters(rng: random.Random, low: int, high: int) -> str:
    """``low`` to ``high`` different letters in random order."""
    return "".join(rng.sample(LETTERS, rng.randint(low, high)))


def misspelt(rng: random.Random, word: str) -> list[str]:
    """Five strings that differ from ``word`` by a swap, a change, a drop, a repeat and an insertion."""
    place = rng.randrange(len(word))
    other = rng.choice([letter for letter in LETTERS if letter != word[place]])
    swapped = list(word)
    swapped[place], swapped[place - 1] = swapped[place - 1], swapped[place]
    return [
        "".join(swapped),
        word[:place] + other + word[place + 1 :],
        word[:place] + word[place + 1 :],
        word[:place] + word[place] + word[place:],
        word[:place] + other + word[place:],
    ]


def near_numbers(rng: random.Random, value: int) -> list[str]:
    """Wrong numbers that look right: off by one, by ten, and by a random small step."""
    steps = [1, -1, 10, -10, 2, -2, rng.randint(3, 9), -rng.randint(3, 9)]
    return [str(value + step) for step in steps if value + step >= 0]
