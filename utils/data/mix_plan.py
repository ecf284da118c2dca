"""What goes into a mix: portions and caps by set, from the published recipe, a YAML file and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import yaml

from router_tuning.errors import UserError

PUBLISHED_PORTIONS = {
    "vicuna_sharegpt": Fraction("2.9"),
    "evol_instruct": Fraction(1),
    "slim_orca": Fraction(1),
    "meta_math_qa": Fraction(1),
    "evol_code_alpaca": Fraction(1),
}
PUBLISHED_SEED = 233

RENDERINGS = {"chat": None, "question": ("Question: {}\nAnswer:", " {}"), "plain": ("{}\n\n", "{}")}
"""Prompt and completion that a single exchange is written as; ``chat`` leaves that to the tokenizer's template."""


@dataclass(frozen=True)
class MixPlan:
    """``portions`` of 2.9 mean each row twice and nine tenths of the rows once more; ``caps`` bound a set's rows.

    ``renderings``: how often single exchanges are written in each way of :data:`RENDERINGS`, in proportion.
    ``held_out``: number of rows at the end of a set that are not mixed, so that they can be evaluated on.
    """

    portions: Mapping[str, Fraction]
    caps: Mapping[str, int]
    seed: int = PUBLISHED_SEED
    dedup: bool = False
    renderings: Mapping[str, Fraction] = field(default_factory=lambda: {"chat": Fraction(1)})
    held_out: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if strangers := sorted({*self.caps, *self.held_out} - set(self.names)):
            raise UserError(f"a cap or held_out is given for {', '.join(strangers)}, of which no portion is mixed")
        if not self.names:
            raise UserError("no data set has a portion above 0: nothing to mix")
        if odd := sorted(set(self.renderings) - set(RENDERINGS)):
            raise UserError(f"rendering {', '.join(odd)} is none of {', '.join(RENDERINGS)}")
        if not any(self.renderings.values()):
            raise UserError("no rendering has a proportion above 0")

    @property
    def names(self) -> list[str]:
        """The sets to mix, in the order given."""
        return [name for name, portion in self.portions.items() if portion > 0]

    def wanted(self, name: str, rows: int) -> int:
        """Rows of the mix that come from a set of ``rows`` rows: portion × rows, halves rounded up, then the cap."""
        exact = math.floor(self.portions[name] * rows + Fraction(1, 2))
        return min(exact, self.caps.get(name, exact))


def make_plan(
    config: Path | None, portions: Iterable[str], caps: Iterable[str], seed: int | None, dedup: bool | None
) -> MixPlan:
    """The published plan, or that of a YAML file, with the changes of the command line (``NAME=NUMBER`` texts)."""
    plan = MixPlan(PUBLISHED_PORTIONS, {}) if config is None else read_plan(config)
    return replace(
        plan,
        portions={**plan.portions, **_numbers(_pairs(portions, "--portion"), portion, "--portion")},
        caps={**plan.caps, **_numbers(_pairs(caps, "--cap"), _count, "--cap")},
        seed=plan.seed if seed is None else seed,
        dedup=plan.dedup if dedup is None else dedup,
    )


def read_plan(path: Path) -> MixPlan:
    """A plan from YAML with the keys ``portions`` and, if wanted, ``caps``, ``seed``, ``dedup``, ``renderings``,
    ``held_out``.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("portions"), dict):
        raise UserError(f"{path} has no 'portions' (a mapping of data sets to numbers)")
    known = [known.name for known in fields(MixPlan)]
    if unknown := sorted(set(map(str, content)) - set(known)):
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    caps, seed, dedup = content.get("caps") or {}, content.get("seed", PUBLISHED_SEED), content.get("dedup", False)
    renderings, held_out = content.get("renderings") or {"chat": 1}, content.get("held_out") or {}
    maps = all(isinstance(value, dict) for value in (caps, renderings, held_out))
    if not maps or type(seed) is not int or type(dedup) is not bool:
        raise UserError(
            f"{path}: 'caps', 'renderings', 'held_out' must be mappings, 'seed' a whole number, 'dedup' true or false"
        )
    portions = _numbers(content["portions"], portion, f"{path}: portion of")
    renderings = _numbers(renderings, portion, f"{path}: rendering")
    held_out = _numbers(held_out, _count, f"{path}: held out of")
    return MixPlan(portions, _numbers(caps, _count, f"{path}: cap of"), seed, dedup, renderings, held_out)


def portion(number: object, where: str) -> Fraction:
    """An exact portion: 2.9 is 29/10, as written, and not the nearest binary number."""
    try:
        value = Fraction(str(number))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{where}: {number!r} is no number") from None
    if value < 0 or isinstance(number, bool):
        raise UserError(f"{where}: {number!r} must be a number of at least 0")
    return value


def _count(number: object, where: str) -> int:
    if not str(number).isdecimal():
        raise UserError(f"{where}: {number!r} is no whole number of rows")
    return int(str(number))


def _numbers(given: Mapping, read: Callable, where: str) -> dict:
    return {str(name): read(number, f"{where} {name}") for name, number in given.items()}


def _pairs(texts: Iterable[str], flag: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for pair in pairs:
        if not all(pair):
            raise UserError(f"{flag} {''.join(pair)}: expected NAME=NUMBER")
    return {name: number for name, _, number in pairs}
