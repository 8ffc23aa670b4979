"""Recipes: functions that return the complete configuration of a run.

A recipe is named by model, task and hardware. They import no engine, so that they can be read,
changed and dry-run on a login node.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_dagger.config import ConfigError, RunConfig
from recipes.quickstart import quickstart

RECIPES: dict[str, Callable[[], RunConfig]] = {"quickstart": quickstart}


def find_recipe(name: str) -> Callable[[], RunConfig]:
    """The recipe of that name; ConfigError says which there are."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(RECIPES)}"
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return RECIPES[name]
