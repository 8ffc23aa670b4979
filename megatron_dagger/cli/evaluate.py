"""Evaluate one round's weights on the held-out tasks.

An evaluated round is not evaluated again. Several workers share the tasks with --worker 0/K to K-1/K; a later
`evaluate` without --worker writes the result.
"""

from __future__ import annotations

import argparse
import asyncio

from megatron_dagger.cli.arguments import TAKE_OVER, add_run
from megatron_dagger.cli.rollout import add_worker
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.preemption import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--round",
        type=int,
        required=True,
        dest="round_index",
        metavar="N",
        help="the round whose weights are evaluated",
    )
    add_worker(parser)
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER)


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.dagger.loop import evaluate
    from megatron_dagger.driver.stages import run_stage_function

    index = arguments.round_index
    worker = Worker.parse(arguments.worker) if arguments.worker else None
    run_stage_function(
        arguments.run_dir,
        lambda context: asyncio.run(evaluate(context, index, worker)),
        worker,
        stage=("evaluate", index),
        take_over=arguments.take_over,
    )
    return 0
