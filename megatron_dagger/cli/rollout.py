"""Collect and label one round's episodes, and seal the round.

A sealed round is not collected again. Several workers share a round with --worker 0/K to K-1/K; a later `rollout`
without --worker seals it. With --resident a worker stays alive through all rounds, next to `train --resident` on
other GPUs (disaggregated): it collects and evaluates, and worker 0 seals.
"""

from __future__ import annotations

import argparse
import asyncio

from megatron_dagger.cli.arguments import TAKE_OVER, add_run
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.preemption import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--round", type=int, dest="round_index", metavar="N", help="the round to collect")
    which.add_argument("--resident", action="store_true", help="stay alive for all rounds, collecting and evaluating")
    add_worker(parser)
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER)


def add_worker(parser: argparse.ArgumentParser) -> None:
    text = "do shard I of K (from 0) of the tasks; a later call without --worker merges and seals the shards"
    parser.add_argument("--worker", metavar="I/K", help=text)


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.dagger.loop import collect
    from megatron_dagger.dagger.resident import work_rounds
    from megatron_dagger.driver.stages import run_stage_function

    run_dir, index, take_over = arguments.run_dir, arguments.round_index, arguments.take_over
    if arguments.resident:
        resident = Worker.parse(arguments.worker or "0/1", resident=True)
        run_stage_function(
            run_dir, lambda context: asyncio.run(work_rounds(context, resident)), resident, take_over=take_over
        )
        return 0
    worker = Worker.parse(arguments.worker) if arguments.worker else None
    run_stage_function(
        run_dir,
        lambda context: asyncio.run(collect(context, index, worker)),
        worker,
        stage=("collect", index),
        take_over=take_over,
    )
    return 0
