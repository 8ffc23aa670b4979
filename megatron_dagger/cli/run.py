"""Run all rounds: collect and label, train, sync the weights, evaluate.

With --recipe a run is created, or resumed if it exists; without, RUN is resumed. Settings of an existing run that
change no result so far (budgets, deadlines, addresses, more rounds) can be changed the same way:

  megatron-dagger run runs/first --recipe quickstart                  start
  megatron-dagger run runs/first                                      resume
  megatron-dagger run runs/first dagger.rounds=5                      resume, and run two more rounds
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from megatron_dagger.cli.arguments import TAKE_OVER, add_new_run, add_run, add_settings, recipe_config
from megatron_dagger.config import dump_yaml, override
from megatron_dagger.driver.preemption import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--recipe", metavar="NAME", help="the recipe to start from (`megatron-dagger recipes` lists them)"
    )
    add_new_run(parser)
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER)
    add_settings(parser, "settings that differ from the recipe's or the run's")


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.cli import report
    from megatron_dagger.dagger.loop import run_rounds
    from megatron_dagger.driver.checks import check_memory
    from megatron_dagger.driver.context import open_run_context
    from megatron_dagger.driver.run_dir import change_run, create_run, load_origin
    from megatron_dagger.observability.logs import setup_logging

    run_dir, dry_run = arguments.run_dir, arguments.dry_run
    if arguments.recipe:
        base, gpu = recipe_config(arguments.recipe), arguments.gpu
        if dry_run:  # before the checks: one may want to see settings that cannot run here
            sys.stdout.write(dump_yaml(override(base, arguments.settings)))
        config = create_run(
            base, run_dir, arguments.settings, recipe=arguments.recipe, here=True, gpu=gpu, dry_run=dry_run
        )
    else:
        config = change_run(run_dir, arguments.settings, take_over=arguments.take_over, dry_run=dry_run)
        if dry_run:
            sys.stdout.write(dump_yaml(config))
    if dry_run:
        return 0
    # The run may have been created for separate stages
    check_memory(config, arguments.gpu or load_origin(run_dir).gpu, one_process=True)
    setup_logging(run_dir)
    rounds = range(config.dagger.rounds + 1)
    with open_run_context(config, run_dir, trains=rounds, take_over=arguments.take_over) as context:
        asyncio.run(run_rounds(context))
    return report.write(run_dir)
