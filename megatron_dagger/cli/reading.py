"""The commands that read a run: its status, its page, its episodes, and those acted again or in other formats."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.config import ConfigError
from megatron_dagger.observability.export import FORMATS

if TYPE_CHECKING:
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.types import Trajectory

EPISODES = 200  # on a page

Command = Callable[[argparse.Namespace], int]


def add_commands(add_run: Callable[[str, Command, str], argparse.ArgumentParser]) -> None:
    """``add_run`` adds a command that takes a run."""
    add_run("status", status, "Rounds, stages, progress, rates, and what failed.")
    page = add_run("report", report, "Write one self-contained HTML page about a run.")
    page.add_argument("--out", type=Path, help="where to write it (default: RUN/report.html)")
    page.add_argument("--episodes", type=int, default=EPISODES, help=f"how many to put in (default: {EPISODES})")
    one = add_run("show", show, "Print an episode turn by turn: who acted, what the teacher would have done.")
    one.add_argument("--list", action="store_true", help="list the matching episodes")
    again = add_run("replay", replay, "Act an episode again, without a model, and compare what comes of it.")
    again.add_argument("--all", action="store_true", help="all matching episodes, not the first alone")
    for sub in (one, again):
        sub.add_argument("--round", type=int, default=0, dest="round_index", metavar="N")
        sub.add_argument("--task", default="", help="a task id, or a part of one (default: the first)")
        sub.add_argument("--evaluation", action="store_true", help="of the evaluation, not of the collection")
        sub.add_argument("--failed", action="store_true", help="only episodes that did not solve their task")
    exported = add_run("export", export, "Write episodes in a format that other tools read.")
    exported.add_argument("--out", type=Path, required=True, metavar="PATH", help="the new file (traj: directory)")
    exported.add_argument(
        "--format",
        choices=FORMATS,
        default="openai",
        help="openai: chat messages, a JSON line an episode (default); labels: a JSON line a labelled state, for "
        "supervised fine-tuning elsewhere; traj: mini-swe-agent's files; predictions: patches, for SWE-bench's "
        "harness; parquet: a row a turn, with tokens",
    )
    exported.add_argument("--round", type=int, action="append", dest="rounds", metavar="N", help="only this round")
    exported.add_argument("--evaluation", action="store_true", help="of the evaluation, not of the collection")
    exported.add_argument("--solved", action="store_true", help="only episodes that solved their task")


def status(arguments: argparse.Namespace) -> int:
    from megatron_dagger.observability import status as told

    sys.stdout.write(told.status(arguments.run_dir, data=_store(arguments.run_dir, "data.zarr")) + "\n")
    return 0


def report(arguments: argparse.Namespace) -> int:
    from megatron_dagger.observability.report import write_report

    path = write_report(
        arguments.run_dir,
        data=_store(arguments.run_dir, "data.zarr"),
        evaluations=_store(arguments.run_dir, "evaluations.zarr"),
        path=arguments.out,
        max_episodes=arguments.episodes,
    )
    sys.stdout.write(f"{path}\n")
    return 0


def show(arguments: argparse.Namespace) -> int:
    from megatron_dagger.observability import show as shown

    for episode in _matching(arguments):
        if not arguments.list:
            shown.show(episode)
            return 0
        mark = "solved" if episode.solved else str(episode.stop_reason)
        sys.stdout.write(f"{episode.task_id:60} {len(episode.turns):3} turns  {mark}\n")
    return 0


def replay(arguments: argparse.Namespace) -> int:
    from megatron_dagger.cli import replay as acted

    return acted.replay(arguments.run_dir, list(itertools.islice(_matching(arguments), None if arguments.all else 1)))


def _matching(arguments: argparse.Namespace) -> Iterator[Trajectory]:
    """The episodes that the arguments name, by task. ConfigError where there is none."""
    store = _episodes(arguments)
    keys = sorted(store.committed(arguments.round_index))
    found = (store.read(arguments.round_index, key) for key in keys if arguments.task in key[0])
    matching = (episode for episode in found if not (arguments.failed and episode.solved))
    first = next(matching, None)
    if first is None:
        others = ", ".join(map(str, store.rounds())) or "none"
        raise ConfigError(
            f"no such episode among the {len(keys)} of round {arguments.round_index}: `show --list` lists them; "
            f"rounds that have episodes: {others}"
        )
    yield first
    yield from matching


def export(arguments: argparse.Namespace) -> int:
    from megatron_dagger.observability import export as written
    from megatron_dagger.rollout.chat import ChatRenderer

    store = _episodes(arguments)
    renderer = ChatRenderer.load(arguments.run_dir / "student")
    count = written.export(
        (
            episode
            for index in arguments.rounds or store.rounds()
            for episode in store.episodes(index)
            if episode.solved or not arguments.solved
        ),
        arguments.out,
        arguments.format,
        system=lambda episode: (
            written.system_message(renderer.text(episode.turns[0].prompt_tokens)) if episode.turns else ""
        ),
    )
    sys.stdout.write(f"{count} episodes in {arguments.out}\n")
    return 0


def _episodes(arguments: argparse.Namespace) -> DataStore:
    from megatron_dagger.driver.context import load_run_config

    load_run_config(arguments.run_dir)  # an error says what is no run
    store = _store(arguments.run_dir, "evaluations.zarr" if arguments.evaluation else "data.zarr")
    if store is None:
        raise ConfigError(f"{arguments.run_dir} has no {'evaluated ' * arguments.evaluation}episodes yet")
    return store


def _store(run_dir: Path, name: str) -> DataStore | None:
    if not (run_dir / name).is_dir():
        return None
    from megatron_dagger.store.aggregated import DataStore

    return DataStore.open(run_dir / name)
