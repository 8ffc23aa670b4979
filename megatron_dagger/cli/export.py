"""Export episodes to formats that other tools read.

openai       one JSON line per episode, OpenAI chat messages
labels       one JSON line per labelled state, for supervised fine-tuning elsewhere
traj         one file per episode, as mini-swe-agent writes them
predictions  one JSON line per patch, for SWE-bench's harness
parquet      one row per turn, with its tokens
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dagger.cli.arguments import add_failed, add_run
from megatron_dagger.config.base import require
from megatron_dagger.observability.export import FORMATS

_ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the new file (traj: directory)")
    parser.add_argument("--format", choices=FORMATS, default="openai", help="default: openai")
    parser.add_argument(
        "--round",
        type=_round,
        action="append",
        dest="rounds",
        metavar="N",
        help="a round, or all; may be repeated (default: the last one with episodes)",
    )
    parser.add_argument("--evaluation", action="store_true", help="episodes of the evaluation, not of the collection")
    outcome = parser.add_mutually_exclusive_group()
    outcome.add_argument("--solved", action="store_true", help="only episodes that solved their task")
    add_failed(outcome)


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.driver.episodes import choose_round, episode_store
    from megatron_dagger.observability.export import export, system_message
    from megatron_dagger.rollout.chat import ChatRenderer

    require(not arguments.out.exists(), f"{arguments.out} exists already; remove it, or name another file")
    store = episode_store(arguments.run_dir, evaluation=arguments.evaluation)
    wanted = arguments.rounds or [None]
    rounds = store.rounds() if _ALL in wanted else [choose_round(arguments.run_dir, store, index) for index in wanted]
    renderer = ChatRenderer.load(arguments.run_dir / "student")
    episodes = (episode for index in rounds for episode in store.episodes(index))
    outcomes = {True} if arguments.solved else {False} if arguments.failed else {True, False}
    count = export(
        (episode for episode in episodes if episode.solved in outcomes),
        arguments.out,
        arguments.format,
        system=lambda episode: system_message(renderer.text(episode.turns[0].prompt_tokens)) if episode.turns else "",
    )
    more = "" if len(rounds) == len(store.rounds()) else f" (--round {_ALL} exports every round)"
    print(f"{count} episodes of round {', '.join(map(str, rounds))} in {arguments.out}{more}")
    return 0


def _round(text: str) -> int | str:
    if text == _ALL:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {_ALL!r}") from None
