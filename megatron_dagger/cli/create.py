"""Create a run without starting it, and print its round numbers (for job scripts).

The rounds' stages can then be jobs of their own: `rollout`, `train`, `evaluate`. Without --recipe and --config the
settings of an existing run are changed, as by `run`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dagger.cli.arguments import add_new_run, add_run, add_settings, recipe_config
from megatron_dagger.config import RunConfig, dump_yaml, load_yaml, override


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe", metavar="NAME", help="the recipe to start from (`megatron-dagger recipes`)")
    source.add_argument("--config", type=Path, metavar="FILE", help="resolved settings in YAML; - for stdin")
    add_new_run(parser)
    add_settings(parser, "settings that differ from the recipe's, the file's or the run's")


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.driver.run_dir import change_run, create_run

    dry_run = arguments.dry_run
    if arguments.recipe or arguments.config:
        file = Path("/dev/stdin") if str(arguments.config) == "-" else arguments.config
        base = recipe_config(arguments.recipe) if arguments.recipe else load_yaml(RunConfig, file)
        if dry_run:  # before the checks: one may want to see settings that cannot run
            sys.stdout.write(dump_yaml(override(base, arguments.settings)))
        config = create_run(
            base, arguments.run_dir, arguments.settings, recipe=arguments.recipe, gpu=arguments.gpu, dry_run=dry_run
        )
    else:
        config = change_run(arguments.run_dir, arguments.settings, dry_run=dry_run)
        if dry_run:
            sys.stdout.write(dump_yaml(config))
    if not dry_run:
        print(*range(config.dagger.rounds + 1))
    return 0
