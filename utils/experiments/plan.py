"""What an experiment file asks for, as cells: each a policy at one budget and seed, with one record as its result."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from router_tuning.errors import UserError
from router_tuning.evaluation.records import cell_name
from router_tuning.model.configuration_mod import SKIP_PATHS, parse_granularity
from router_tuning.places import ROOT


@dataclass
class Text:
    """Text to score on: how many documents, of how many tokens, and rows of the file that are passed over."""

    file: str
    documents: int = 64
    max_tokens: int = 256
    first: int = 0


@dataclass(frozen=True)
class Cell:
    """One policy to score; a control is that of the run beside it.

    ``budget`` is a share of the decoder's operations, None for what a run ends at.
    """

    policy: str
    recipe: str | None = None
    granularity: str | None = None
    seed: int | None = None
    budget: float | None = None

    @property
    def name(self) -> str:
        """As in results and on the command line."""
        return cell_name(vars(self))


@dataclass
class Plan:
    """An experiment file. Paths may name environment variables (``${MOD_EVAL_DATA}/…``).

    Attributes:
        base: checkpoint folder, relative to the repository. dtype: of its weights.
        data: training rows, and those that static removal and its skip paths are chosen on.
        recipes: ``{label: {flag: value}}`` of ``finetune_mod.py``; one with its own ``granularity`` runs at it alone.
            All but ``recipe: paper`` have a dial and are scored at every budget; that one at what it reaches.
        granularities, budgets, seeds: the grid; budgets are shares of the decoder's operations.
        random: whether random decisions at the rates of every routed cell of the first seed are scored.
        static: skip paths (``zero``, ``mean``, ``low_rank``) with which modules are removed for good, until what every
            routed cell of the first seed leaves is left.
        search_tokens: number of tokens of ``data`` that removal is chosen on; candidates: see ``removal_order``.
        fit_tokens: number of tokens behind these that its skip paths are fitted on.
        tasks: lm-eval tasks or groups; documents: of each, None for all; batch_size, num_fewshot.
        texts: by name, as :class:`Text` has them.
        timed: name of a text whose prompts are timed, first seed; timed_prompts: how many; new_tokens, repeats.
    """

    name: str
    base: str
    data: str
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    granularities: list[str] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    random: bool = True
    static: list[str] = field(default_factory=list)
    search_tokens: int = 2000
    candidates: int = 4
    fit_tokens: int = 10_000
    tasks: list[str] = field(default_factory=list)
    documents: int | None = None
    batch_size: int = 16
    num_fewshot: int | None = None
    texts: dict[str, Any] = field(default_factory=dict)
    timed: str | None = None
    timed_prompts: int = 16
    new_tokens: int = 16
    repeats: int = 5
    dtype: str = "auto"

    def __post_init__(self) -> None:
        problems = [f"budget {budget} must lie in (0, 1)" for budget in self.budgets if not 0 < budget < 1]
        own = [flags["granularity"] for flags in self.recipes.values() if "granularity" in flags]
        for granularity in dict.fromkeys([*self.granularities, *own]):
            try:
                parse_granularity(granularity)
            except ValueError as error:
                problems.append(str(error))
        problems += [
            f"static {kind!r} is none of {', '.join(SKIP_PATHS)}" for kind in self.static if kind not in SKIP_PATHS
        ]
        for name, text in self.texts.items():
            self.texts[name] = text = Text(**text)
            used = [flags.get("max_train_samples", 1000) for flags in self.recipes.values()]
            if text.file == self.data and not all(0 < rows <= text.first for rows in used):
                problems.append(
                    f"text {name}: its rows train recipes; let 'first' pass over the largest max_train_samples"
                )
        if self.timed is not None and self.timed not in self.texts:
            problems.append(f"timed {self.timed!r} is none of the texts")
        if not self.tasks and not self.texts:
            problems.append("nothing to score on: name tasks or texts")
        if problems:
            raise UserError(f"experiment {self.name}: " + "; ".join(problems))

    @property
    def removable(self) -> str:
        """Granularity of the modules that static removal chooses from: all that a run of the grid routes."""
        parts = {name.split("_")[0] for name in "+".join(self.granularities).split("+")}
        if len(parts) > 1 and "block" in parts:  # beside others a block is both of its modules
            parts = parts - {"block"} | {"attn", "mlp"}
        return "+".join(f"{part}_{'token' if part == 'expert' else 'sequence'}" for part in sorted(parts))

    def has_dial(self, recipe: str) -> bool:
        """Whether a recipe's runs can be scored at any budget."""
        return self.recipes[recipe].get("recipe", "paper") != "paper"

    def groups(self) -> list[list[Cell]]:
        """Cells that belong together: the dense base; each run at its budgets, with its controls."""
        found = [[Cell("dense")]]
        for seed, (label, flags) in product(self.seeds, self.recipes.items()):
            own = flags.get("granularity")
            controls = [*["random"] * self.random, *(f"static_{kind}" for kind in self.static)]
            for granularity in [own] if own else self.granularities:
                budgets = self.budgets if self.has_dial(label) else [None]
                policies = product(budgets, ["routed", *(controls if seed == self.seeds[0] else [])])
                found.append([Cell(policy, label, granularity, seed, budget) for budget, policy in policies])
        return found

    def fingerprint(self, cell: Cell) -> str:
        """Changes with every setting that a cell's result depends on."""
        odd = {"name", "recipes", "granularities", "budgets", "seeds", "random", "static"}
        odd |= set() if cell.policy.startswith("static") else {"search_tokens", "candidates", "fit_tokens"}
        settings = {name: value for name, value in vars(self).items() if name not in odd}
        settings["recipe"] = self.recipes.get(cell.recipe or "")
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=vars).encode()).hexdigest()[:12]

    def path(self, text: str) -> Path:
        """A path of the file, with environment variables put in; relative ones lie in the repository.

        Raises:
            UserError: for a variable that is not set.
        """
        filled = os.path.expanduser(os.path.expandvars(text))
        if missing := re.findall(r"\$\{?(\w+)", filled):
            raise UserError(f"experiment {self.name}: {text}: set the environment variable {missing[0]}")
        return ROOT / filled


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
    try:
        return Plan(**{"name": path.stem, **content})
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: {str(error).replace('__init__() ', '')}") from None
