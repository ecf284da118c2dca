"""Tasks of running text: dialogues whose later turns refer to earlier ones, and short stories."""

from __future__ import annotations

import random

from router_tuning.embedded.sample_drafts import ANIMALS, COLOURS, Draft, letters, misspelt, near_numbers, talk

NAMES = ("Ana", "Ben", "Eva", "Gus", "Ian", "Kim", "Leo", "Mia", "Nora", "Otto", "Pia", "Tom")
THINGS = ("key", "ring", "map", "lamp", "book", "bell", "coin", "hat")
PLACES = ("lake", "hill", "barn", "well", "mill", "cave", "road", "tree")
MOODS = ("happy", "tired", "proud", "glad")
WEATHER = ("sun", "rain", "snow", "wind", "fog")
HERO = {"name": NAMES, "colour": COLOURS, "animal": ANIMALS, "thing": THINGS}


def _recall(rng: random.Random) -> Draft:
    """A person says three things about himself and asks for two of them."""
    pools = {"name": NAMES, "colour": COLOURS, "animal": ANIMALS}
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


def _told(hero: dict[str, str], rest: dict[str, str]) -> str:
    return (
        "{name} was a {colour} {animal}. One day {name} lost a {thing}. There was {weather} near the {place}, but "
        '{name} met a {helper}. The {helper} said: "Your {thing} is in the {where}." So {name} went to the {where} '
        "and found the {thing}. {name} and the {helper} were {mood}."
    ).format(**hero, **rest)


def story(rng: random.Random) -> Draft:
    """A short story about a given hero; the rest is free, so it is judged as running text."""
    hero = {part: rng.choice(pool) for part, pool in HERO.items()}
    place, where = rng.sample(PLACES, 2)
    helper = rng.choice([animal for animal in ANIMALS if animal != hero["animal"]])
    rest = {
        "place": place,
        "where": where,
        "helper": helper,
        "mood": rng.choice(MOODS),
        "weather": rng.choice(WEATHER),
    }
    prompt = "Write a story about {name}, a {colour} {animal}, and a {thing}.".format(**hero)
    wrong = []
    for part, pool in HERO.items():
        other = rng.choice([word for word in pool if word not in (hero[part], helper)])
        wrong.append(_told({**hero, part: other}, rest))
    return Draft("/".join(hero.values()), talk(prompt, _told(hero, rest)), wrong)
