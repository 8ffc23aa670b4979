"""Recipes: functions that return the complete configuration of a run, named by model, task and hardware.

The folder is linked into the package: import it as ``megatron_dagger.recipes``. Recipes import no engine, so they can
be read, changed and checked on a login node.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from megatron_dagger.config import ConfigError, RunConfig
from megatron_dagger.parts import import_part
from megatron_dagger.recipes.long_repair import long_repair
from megatron_dagger.recipes.positive_control import positive_control
from megatron_dagger.recipes.quickstart import quickstart
from megatron_dagger.recipes.qwen3 import (
    qwen3_4b_fp8_swegym_8h100,
    qwen3_4b_swegym_4x8h100,
    qwen3_4b_swegym_8h100,
    qwen3_8b_fp8_swegym_8h100,
    qwen3_8b_swegym_4x8h100,
    qwen3_8b_swegym_8h100,
    qwen3_30b_a3b_swegym_4x8h100,
    qwen3_coder_30b_a3b_swebench_4x8h100,
)
from megatron_dagger.recipes.short_repair import short_repair
from megatron_dagger.recipes.smollm2 import smollm2_135m_repair_1gpu

RECIPES: dict[str, Callable[[], RunConfig]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        short_repair,
        long_repair,
        positive_control,
        smollm2_135m_repair_1gpu,
        qwen3_4b_swegym_8h100,
        qwen3_8b_swegym_8h100,
        qwen3_4b_fp8_swegym_8h100,
        qwen3_8b_fp8_swegym_8h100,
        qwen3_4b_swegym_4x8h100,
        qwen3_8b_swegym_4x8h100,
        qwen3_30b_a3b_swegym_4x8h100,
        qwen3_coder_30b_a3b_swebench_4x8h100,
    )
}


def find_recipe(name: str) -> Callable[[], RunConfig]:
    """Return the recipe of that name, or one of your own by its import path, ``package.module:function``.

    Raises ConfigError with the nearest name, or all names, if there is none.
    """
    if ":" in name:
        own: Callable[[], RunConfig] = import_part(name, "--recipe")
        return own
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(RECIPES)}"
        raise ConfigError(f"unknown recipe {name!r}; {hint}")
    return RECIPES[name]
