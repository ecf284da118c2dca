"""What an experiment file asks for, as a list of cells: each a small job with one JSON as its result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from router_tuning.embedded.sample_tasks import TASKS
from router_tuning.errors import UserError
from router_tuning.model.configuration_mod import parse_granularity

KINDS = ("dense", "masks", "tune", "score", "random", "static", "cost")
SCORED = ("heldout", "validation")
OWN = "own"  # the capacity that a recipe ends at by itself
MATCH = "match"  # the capacity that the published recipe ends at


@dataclass(frozen=True)
class Cell:
    """One job. ``capacity`` is a share, :data:`OWN` or :data:`MATCH`; fields that a kind does not need are None."""

    kind: str
    recipe: str | None = None
    granularity: str | None = None
    seed: int | None = None
    capacity: float | str | None = None

    @property
    def name(self) -> str:
        """File name without its ending."""
        parts = [self.kind, self.recipe, self.granularity]
        parts += [f"seed{self.seed}" if self.seed is not None else None]
        parts += [f"c{self.capacity:g}" if isinstance(self.capacity, float) else self.capacity]
        return "__".join(part for part in parts if part is not None)


@dataclass
class Plan:
    """An experiment file.

    Attributes:
        name: of the folder of results. base: checkpoint folder, relative to the repository.
        tasks: of the generator, scored by exact match; text_task: scored by perplexity.
        train_per_task: rows per task and seed. items, choices, texts: held-out items per task that are scored.
        search_per_task: training-split items on which static masks are chosen (never trained or scored on).
        recipes: ``{label: {flag: value}}`` of ``finetune_mod.py``; those with ``recipe: budget`` have a dial.
        granularities, budgets, seeds: the grid. dial: further budgets, generation only, first seed only.
        statics: ``{part: method}``, parts of a granularity without their level.
        training: ``{label: {field: value}}`` of ``budget.training.TrainSettings``, for recipes that try other ones.
        sources: ``{label: tasks}``, for recipes that train on rows of these tasks alone (as many in all).
        scored: ``heldout``: the committed items; ``validation``: others, of the training split and never trained on,
            to choose settings by. costs: whether time is measured.
        extra: ``[{recipe, granularity}]``, outside the grid, every seed scored at the capacity that it reaches.
    """

    name: str
    base: str
    tasks: list[str]
    recipes: dict[str, dict[str, Any]]
    granularities: list[str]
    budgets: list[float]
    seeds: list[int]
    text_task: str = "story"
    train_per_task: int = 160
    search_per_task: int = 32
    items: int = 128
    choices: int = 64
    texts: int = 48
    dial: list[float] = field(default_factory=list)
    statics: dict[str, str] = field(default_factory=dict)
    extra: list[dict[str, str]] = field(default_factory=list)
    grid_recipes: list[str] = field(default_factory=list)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    scored: str = "heldout"
    costs: bool = True

    def __post_init__(self) -> None:
        named = [*self.tasks, self.text_task, *(task for tasks in self.sources.values() for task in tasks)]
        problems = [f"unknown task {task!r}" for task in named if task not in TASKS]
        for granularity in self.granularities:
            try:
                parse_granularity(granularity)
            except ValueError as error:
                problems.append(str(error))
        problems += [f"budget {b} must lie in (0, 1)" for b in [*self.budgets, *self.dial] if not 0 < b < 1]
        known = set(self.recipes)
        named = [*self.grid_recipes, *self.training, *self.sources, *(entry.get("recipe", "") for entry in self.extra)]
        problems += [f"recipe {name!r} is not described under 'recipes'" for name in named if name not in known]
        if self.scored not in SCORED:
            problems.append(f"scored {self.scored!r} is none of {', '.join(SCORED)}")
        if problems:
            raise UserError(f"experiment {self.name}: " + "; ".join(problems))

    def has_dial(self, recipe: str) -> bool:
        """Whether a recipe's runs can be scored at any budget."""
        return self.recipes[recipe].get("recipe") == "budget"

    def cells(self) -> Iterator[Cell]:
        """All cells, the most telling first: the grid on every seed, then controls, then the dial and costs."""
        yield Cell("dense")
        if "attn_sequence" in self.granularities:
            yield Cell("masks")
        for seed in self.seeds:
            yield from self._of_seed(seed)
        yield from (Cell("static", recipe=method, granularity=part) for part, method in self.statics.items())
        for entry, seed in product(self.extra, self.seeds):
            yield Cell("tune", entry["recipe"], entry["granularity"], seed)
            yield Cell("score", entry["recipe"], entry["granularity"], seed, OWN)
        yield from self._dial(self.seeds[0])
        if self.costs:
            yield from self._costs(self.seeds[0])

    def _of_seed(self, seed: int) -> Iterator[Cell]:
        for granularity in self.granularities:
            for recipe in self.grid_recipes:
                yield Cell("tune", recipe, granularity, seed)
                if not self.has_dial(recipe):
                    yield Cell("score", recipe, granularity, seed, OWN)
                    continue
                yield from (Cell("score", recipe, granularity, seed, budget) for budget in self.budgets)
                if any(not self.has_dial(other) for other in self.grid_recipes):
                    yield Cell("score", recipe, granularity, seed, MATCH)
            yield from (Cell("random", None, granularity, seed, budget) for budget in self.budgets)

    def _dial(self, seed: int) -> Iterator[Cell]:
        for granularity in self.granularities:
            for recipe in filter(self.has_dial, self.grid_recipes):
                yield from (Cell("score", recipe, granularity, seed, b) for b in self.dial if b not in self.budgets)

    def _costs(self, seed: int) -> Iterator[Cell]:
        for budget in self.budgets:
            for granularity in self.granularities:
                for recipe in filter(self.has_dial, self.grid_recipes):
                    yield Cell("cost", recipe, granularity, seed, budget)
            for part, method in self.statics.items():
                yield Cell("cost", method, part, None, budget)


def read_plan(path: Path) -> Plan:
    """Read a YAML file; UserError names what is missing, unknown or out of range."""
    if not path.is_file():
        raise UserError(f"{path}: no such experiment file; see configs/experiments")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected 'key: value' lines")
    known = {f.name: f for f in fields(Plan)}
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise UserError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    try:
        return Plan(**content)
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None
