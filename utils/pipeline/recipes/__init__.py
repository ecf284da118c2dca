"""Ways to tune routers. A recipe is a module with ``tune(job) -> TunedRun``, imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

RECIPES = {"paper": "utils.pipeline.recipes.paper"}
"""Name on the command line → module."""


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe; KeyError for an unknown name."""
    return import_module(RECIPES[name])
