"""Ways to tune routers. A recipe is a module, imported when it is asked for, of two functions.

``tune(job) -> TunedRun`` trains; ``measure(job, tuned)`` calibrates and measures what has been saved by then.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

RECIPES = {
    "paper": "router_tuning.tuning.recipes.paper",
    "budget": "router_tuning.tuning.recipes.budget.recipe",
    "fisher": "router_tuning.tuning.recipes.budget.fisher",
}
"""Name on the command line → module."""

RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "budget": {
        "router_pooling": "prompt",
        "learning_rate": 1e-2,
        "gradient_scale": 0.1,
        "global_batch_size": 32,
        "num_train_epochs": 3.0,
    },
}
"""Where a recipe's defaults differ from the published ones; a flag that is given counts for every recipe."""


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe; KeyError for an unknown name."""
    return import_module(RECIPES[name])
