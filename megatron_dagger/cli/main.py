"""``megatron-dagger``: DAgger rounds for language-model agents, on Megatron-Core and vLLM."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_dagger.cli import grade, plan, reading, validate
from megatron_dagger.config import RunConfig, dump_yaml, load_yaml, override
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.preemption import stops_when_asked
from megatron_dagger.policies.base import BudgetSpent

logger = logging.getLogger("megatron_dagger.cli.main")  # also where it runs as __main__

EPILOG = """\
a run:
  megatron-dagger plan quickstart                        what it needs on GPUs: memory, rates, hours
  megatron-dagger run runs/first --recipe quickstart     start (or go on with) a run
  megatron-dagger status runs/first                      where it is, also while it runs
  megatron-dagger show runs/first --round 1 --failed     read an episode, turn by turn
  megatron-dagger report runs/first                      one HTML page about all of it

A killed run goes on where it was: repeat its command. Settings are changed by NAME=VALUE, for
example `dagger.rounds=5 training.optimizer.lr=1e-3`; --print shows them all. Those of an existing run that
do not change what it computes (budgets, deadlines, urls): `megatron-dagger run RUN NAME=VALUE`.

exit codes: 0 done, 1 a part failed, 2 settings, data or the machine are at fault, 75 stopped by SIGTERM or
SIGUSR1 after saving what was done (a job's script requeues its job then)
"""
TAKE_OVER = "shut out a process that works on the run and cannot be ended: it may write no more"


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)  # argparse ends a list of words at the next option
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings = [*arguments.settings, *settings]
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; the same command again goes on from here\n")
        return 130
    except (ValueError, OSError) as error:  # settings, data or the machine: the message says what to change
        sys.stderr.write(f"error: {error}\n")
        logger.debug("the error came from here", exc_info=True)
        return 2
    except BudgetSpent as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except RuntimeError as error:  # a part failed under way: what was committed is kept
        sys.stderr.write(f"error: {type(error).__name__}: {error}\nthe same command again goes on from here\n")
        logger.debug("the error came from here", exc_info=True)
        return 1
    finally:
        gc.freeze()  # else the interpreter's end looks through all that vLLM and torch have made, for seconds


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("megatron-dagger", description=__doc__, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, formatter_class=raw)
        sub.set_defaults(command=command)
        return sub

    def add_run(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = add(name, command, text)
        sub.add_argument("run_dir", type=Path, metavar="RUN", help="the run directory")
        return sub

    run = add_run("run", _run, "Run all rounds: collect, label, aggregate, train, sync, evaluate.")
    run.add_argument("--recipe", help="the settings to start from (see `recipes`); not needed to go on with a run")
    run.add_argument("--print", action="store_true", dest="only_print", help="print the resolved settings and stop")
    run.add_argument("--take-over", action="store_true", help=TAKE_OVER)
    run.add_argument(
        "settings", nargs="*", metavar="NAME=VALUE", help="settings that differ from the recipe's, or are to be changed"
    )

    create = add_run("create", _create, "Write a run's settings, and print its rounds; its stages can then be jobs.")
    given = create.add_mutually_exclusive_group()  # neither: to change an existing run's
    given.add_argument("--recipe", help="the settings to start from (see `recipes`)")
    given.add_argument("--config", type=Path, metavar="FILE", help="resolved settings in YAML; - for stdin")
    create.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings that differ from these")

    add("recipes", _recipes, "List the recipes.")
    plan.add_arguments(add("plan", plan.plan, "Memory, rates and hours of a recipe, before it is queued."))
    stages = (
        ("rollout", _rollout, "Collect and label one round's episodes, and seal them."),
        ("train", _train, "Train one round on the aggregated labels."),
        ("evaluate", _evaluate, "Evaluate one round's weights on the held-out tasks."),
    )
    for name, command, text in stages:
        stage = add_run(name, command, text + " A stage that is done is not run again.")
        which = stage.add_mutually_exclusive_group(required=True)
        which.add_argument("--round", type=int, dest="round_index", metavar="N")
        if name == "train":
            text = "live through all rounds: train each once it is collected, and hand the weights to the workers"
            which.add_argument("--resident", action="store_true", help=text)
            stage.add_argument("--rank", action="store_true", help="be one rank; torchrun's variables say which")
        else:
            text = "do every K-th episode only, the I-th (from 0) first, beside other workers; seal nothing"
            stage.add_argument("--worker", metavar="I/K", help=text)
        if name == "rollout":
            text = "live through all rounds, beside `train --resident`: collect and evaluate; worker 0 seals"
            which.add_argument("--resident", action="store_true", help=text)
        stage.add_argument("--take-over", action="store_true", help=TAKE_OVER)

    validate.add_arguments(add("validate", validate.validate, "Validate SWE tasks."))
    grade.add_arguments(add("grade", grade.grade, "Grade patches by SWE-bench's own harness, in Docker."))
    reading.add_commands(add_run)
    return parser


@stops_when_asked()
def _run(arguments: argparse.Namespace) -> int:
    from megatron_dagger.dagger.loop import run_rounds
    from megatron_dagger.driver.context import change_run, create_run, open_run_context
    from megatron_dagger.observability.logs import setup_logging

    if arguments.recipe:
        config = override(_recipe(arguments.recipe), arguments.settings)
        config = config if arguments.only_print else create_run(config, arguments.run_dir)
    else:
        only_check, take_over = arguments.only_print, arguments.take_over
        config = change_run(arguments.run_dir, arguments.settings, only_check=only_check, take_over=take_over)
    if arguments.only_print:
        sys.stdout.write(dump_yaml(config))
        return 0
    setup_logging(arguments.run_dir)
    rounds = range(config.dagger.rounds + 1)
    with open_run_context(config, arguments.run_dir, trains=rounds, take_over=arguments.take_over) as parts:
        asyncio.run(run_rounds(parts))
    return reading.report(argparse.Namespace(run_dir=arguments.run_dir, out=None, episodes=reading.EPISODES))


def _create(arguments: argparse.Namespace) -> int:
    from megatron_dagger.driver.context import change_run, create_run

    if arguments.recipe or arguments.config:
        file = Path("/dev/stdin") if str(arguments.config) == "-" else arguments.config
        config = _recipe(arguments.recipe) if arguments.recipe else load_yaml(RunConfig, file)
        config = create_run(override(config, arguments.settings), arguments.run_dir)
    else:
        config = change_run(arguments.run_dir, arguments.settings)
    print(*range(config.dagger.rounds + 1))
    return 0


def _recipe(name: str) -> RunConfig:
    from recipes import find_recipe

    return find_recipe(name)()


def _recipes(arguments: argparse.Namespace) -> int:
    from recipes import RECIPES

    for name, recipe in RECIPES.items():
        sys.stdout.write(f"{name:32} {(recipe.__doc__ or '').splitlines()[0]}\n")
    return 0


def _rollout(arguments: argparse.Namespace) -> int:
    from megatron_dagger.dagger.loop import collect
    from megatron_dagger.dagger.resident import work_rounds

    if arguments.resident:
        resident = Worker.parse(arguments.worker or "0/1", resident=True)
        return _stage(arguments, lambda parts: asyncio.run(work_rounds(parts, resident)), resident)
    worker = Worker.parse(arguments.worker) if arguments.worker else None
    return _stage(arguments, lambda parts: asyncio.run(collect(parts, arguments.round_index, worker)), worker)


def _evaluate(arguments: argparse.Namespace) -> int:
    from megatron_dagger.dagger.loop import evaluate

    worker = Worker.parse(arguments.worker) if arguments.worker else None
    return _stage(arguments, lambda parts: asyncio.run(evaluate(parts, arguments.round_index, worker)), worker)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.rank:
        from megatron_dagger.driver.context import load_run_config
        from megatron_dagger.driver.training import train_rank, train_resident_rank

        level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
        logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
        config = load_run_config(arguments.run_dir)
        if arguments.resident:
            train_resident_rank(config, arguments.run_dir)
        else:
            train_rank(config, arguments.run_dir, arguments.round_index)
        return 0
    return _train_node(arguments)


@stops_when_asked()
def _train_node(arguments: argparse.Namespace) -> int:
    """The first node holds the run; the others only start their ranks."""
    from megatron_dagger.dagger.loop import train
    from megatron_dagger.driver.context import load_run_config
    from megatron_dagger.driver.training import train_beside, train_resident
    from megatron_dagger.training.ranks.launch import node_rank

    config = load_run_config(arguments.run_dir)
    if arguments.resident:
        train_resident(config, arguments.run_dir, take_over=arguments.take_over)
        return 0
    if node_rank(config.training.parallel) == 0:
        return _stage(arguments, lambda parts: train(parts, arguments.round_index))
    train_beside(config, arguments.run_dir, arguments.round_index)
    return 0


@stops_when_asked()
def _stage(arguments: argparse.Namespace, stage: Callable[..., None], worker: Worker | None = None) -> int:
    from megatron_dagger.driver.context import load_run_config, open_run_context
    from megatron_dagger.observability.logs import DRIVER, setup_logging

    config = load_run_config(arguments.run_dir)
    setup_logging(arguments.run_dir, name=worker.name if worker else DRIVER)
    with open_run_context(config, arguments.run_dir, worker=worker, take_over=arguments.take_over) as parts:
        stage(parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
