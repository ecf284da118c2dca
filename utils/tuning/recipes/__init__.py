"""Ways to tune routers. A recipe is a module, imported when it is asked for, of two functions.

``tune(run) -> TunedRun`` trains; ``measure(run, tuned)`` calibrates and measures what has been saved by then.
"""

from __future__ import annotations

from typing import Any

RECIPES = {"paper": "router_tuning.tuning.recipes.paper", "budget": "router_tuning.tuning.recipes.budget.recipe"}
"""Name on the command line → module."""

RECIPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "budget": {
        "router_pooling": "prompt",
        "skip": "low_rank",
        "train_skip": True,
        "adam_beta2": 0.99,
        "learning_rate": 6e-3,
        "gradient_scale": 0.0,
        "global_batch_size": 16,
        "num_train_epochs": 3.0,
    }
}
"""Where a recipe's defaults differ from the published ones; a flag that is given counts for every recipe."""


def recipe_defaults(name: str | None, granularity: str | None) -> dict[str, Any]:
    """Where the defaults of a run differ from the published ones; single experts have no skip path."""
    defaults = RECIPE_DEFAULTS.get(name, {})
    return {k: v for k, v in defaults.items() if "skip" not in k or granularity != "expert_token"}
