"""List the recipes: complete settings, named by model, task and hardware."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments."""


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:32} {(recipe.__doc__ or '').strip().splitlines()[0]}")
    return 0
