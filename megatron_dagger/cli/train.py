"""Train one round on the aggregated labels of all rounds so far.

A trained round is not trained again. On several nodes, start this command once per node (torchrun's or SLURM's
variables say which node is which). With --resident the trainer stays alive through all rounds, next to `rollout
--resident` on other GPUs: it trains each round once it is collected and hands its weights to the workers.
"""

from __future__ import annotations

import argparse
import logging
import os

from megatron_dagger.cli.arguments import TAKE_OVER, add_run
from megatron_dagger.driver.preemption import stop_on_signals


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--round", type=int, dest="round_index", metavar="N", help="the round to train")
    which.add_argument("--resident", action="store_true", help="stay alive and train all rounds")
    parser.add_argument("--take-over", action="store_true", help=TAKE_OVER)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # run as one rank; see driver.training


def main(arguments: argparse.Namespace) -> int:
    return _run_rank(arguments) if arguments.rank else _start_ranks(arguments)


def _run_rank(arguments: argparse.Namespace) -> int:
    """Run as one rank, whose number is in torchrun's variables. The trainer itself handles SIGTERM."""
    from megatron_dagger.driver.run_dir import load_run_config
    from megatron_dagger.driver.training import train_rank, train_resident_rank

    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
    config = load_run_config(arguments.run_dir)
    if arguments.resident:
        train_resident_rank(config, arguments.run_dir)
    else:
        train_rank(config, arguments.run_dir, arguments.round_index)
    return 0


@stop_on_signals()
def _start_ranks(arguments: argparse.Namespace) -> int:
    """Start this node's ranks. The first node holds the run; the others only start their ranks."""
    from megatron_dagger.dagger.loop import train
    from megatron_dagger.driver.run_dir import check_round, load_run_config
    from megatron_dagger.driver.stages import run_stage_function
    from megatron_dagger.driver.training import train_on_further_node, train_resident
    from megatron_dagger.training.ranks.launch import node_rank

    run_dir, index, take_over = arguments.run_dir, arguments.round_index, arguments.take_over
    config = load_run_config(run_dir)
    if arguments.resident:
        train_resident(config, run_dir, take_over=take_over)
        return 0
    check_round(config, index)
    if node_rank(config.training.parallel) == 0:
        run_stage_function(run_dir, lambda context: train(context, index), stage=("train", index), take_over=take_over)
    else:
        train_on_further_node(config, run_dir, index)
    return 0
