"""Recipes: functions that return the complete configuration of a run.

A recipe is named by model, task and hardware. They import no engine, so that they can be read,
changed and dry-run on a login node.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_dagger.config import ConfigError, RunConfig
from recipes.quickstart import quickstart
from recipes.qwen3 import (
    qwen3_4b_swegym_4x8h100,
    qwen3_4b_swegym_8h100,
    qwen3_8b_swegym_4x8h100,
    qwen3_8b_swegym_8h100,
    qwen3_30b_a3b_swegym_4x8h100,
)
from recipes.smollm2 import smollm2_135m_repair_1gpu

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        smollm2_135m_repair_1gpu,
        qwen3_4b_swegym_8h100,
        qwen3_8b_swegym_8h100,
        qwen3_4b_swegym_4x8h100,
        qwen3_8b_swegym_4x8h100,
        qwen3_30b_a3b_swegym_4x8h100,
    )
}


def find_recipe(name: str) -> Callable[[], RunConfig]:
    """The recipe of that name; ConfigError says which there are."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(RECIPES)}"
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return RECIPES[name]
