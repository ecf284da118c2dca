"""What goes into a mix: portions and caps by set, from the published recipe, a YAML file and the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import yaml

from router_tuning.errors import UserError

PUBLISHED_PORTIONS = {"vicuna_sharegpt": Fraction("2.9")}
PUBLISHED_PORTIONS |= dict.fromkeys(("evol_instruct", "slim_orca", "meta_math_qa", "evol_code_alpaca"), Fraction(1))
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
    """The published plan, or that of a YAML file, with the changes of the command line (``NAME=NUMBER`` texts).

    Raises:
        UserError: for a file that cannot be read, unknown keys, and numbers that are none.
    """
    content = {"portions": PUBLISHED_PORTIONS} if config is None else _read(config)
    where = f"{config}: " if config else ""
    kinds = {"portions": _portion, "caps": _count, "renderings": _portion, "held_out": _count}
    for name in kinds:
        if not isinstance(content.setdefault(name, {}), dict):
            raise UserError(f"{where}{name!r} must be a mapping of names to numbers")
    content["portions"] = content["portions"] | _pairs(portions, "--portion")
    content["caps"] = content["caps"] | _pairs(caps, "--cap")
    for name, read in kinds.items():
        content[name] = {str(key): read(value, f"{where}{name}, {key}") for key, value in content[name].items()}
    if not content["renderings"]:
        del content["renderings"]
    content |= {name: value for name, value in (("seed", seed), ("dedup", dedup)) if value is not None}
    if type(content.get("seed", 0)) is not int or type(content.get("dedup", False)) is not bool:
        raise UserError(f"{where}'seed' must be a whole number, 'dedup' true or false")
    return MixPlan(**content)


def _read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or "portions" not in content:
        raise UserError(f"{path} has no 'portions' (a mapping of data sets to numbers)")
    known = [known.name for known in fields(MixPlan)]
    if unknown := sorted(set(map(str, content)) - set(known)):
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: value for name, value in content.items() if value is not None}


def _portion(number: object, where: str) -> Fraction:
    """An exact portion: 2.9 is 29/10, as written, and not the nearest binary number."""
    try:
        value = Fraction(str(number))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{where}: {number!r} is no number") from None
    if value < 0:
        raise UserError(f"{where}: {number!r} must be a number of at least 0")
    return value


def _count(number: object, where: str) -> int:
    if not str(number).isdecimal():
        raise UserError(f"{where}: {number!r} is no whole number of rows")
    return int(str(number))


def _pairs(texts: Iterable[str], flag: str) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for pair in pairs:
        if not all(pair):
            raise UserError(f"{flag} {''.join(pair)}: expected NAME=NUMBER")
    return {name: number for name, _, number in pairs}
