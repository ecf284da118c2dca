"""What goes into a mix: portions and caps by set, from the published recipe, a YAML file and the command line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class MixPlan:
    """``portions`` of 2.9 mean each row twice and nine tenths of the rows once more; ``caps`` bound a set's rows."""

    portions: Mapping[str, Fraction]
    caps: Mapping[str, int]
    seed: int = PUBLISHED_SEED
    dedup: bool = False

    def __post_init__(self) -> None:
        strangers = sorted(set(self.caps) - set(self.names))
        if strangers:
            raise UserError(f"a cap is given for {', '.join(strangers)}, of which no portion is mixed")
        if not self.names:
            raise UserError("no data set has a portion above 0: nothing to mix")

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
    """A plan from YAML with the keys ``portions`` and, if wanted, ``caps``, ``seed``, ``dedup``."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("portions"), dict):
        raise UserError(f"{path} has no 'portions' (a mapping of data sets to numbers)")
    unknown = sorted(set(map(str, content)) - {"portions", "caps", "seed", "dedup"})
    if unknown:
        raise UserError(f"{path}: unknown key {', '.join(unknown)}; known: portions, caps, seed, dedup")
    caps, seed, dedup = content.get("caps") or {}, content.get("seed", PUBLISHED_SEED), content.get("dedup", False)
    if not isinstance(caps, dict) or type(seed) is not int or type(dedup) is not bool:
        raise UserError(f"{path}: 'caps' must be a mapping, 'seed' a whole number, 'dedup' true or false")
    portions = _numbers(content["portions"], portion, f"{path}: portion of")
    return MixPlan(portions, _numbers(caps, _count, f"{path}: cap of"), seed, dedup)


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
