"""Print an episode turn by turn: the observation, who acted, the action, and the teacher's label."""

from __future__ import annotations

import argparse

from megatron_dagger.cli.arguments import add_episode_filter, add_run, chosen_episodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_episode_filter(parser)
    parser.add_argument("--list", action="store_true", help="list the matching episodes instead of printing the first")


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.observability.show import show

    episodes = chosen_episodes(arguments)
    if not arguments.list:
        show(next(episodes))
        return 0
    for episode in episodes:
        outcome = "solved" if episode.solved else str(episode.stop_reason)
        print(f"{episode.task_id:60} {len(episode.turns):3} turns  {outcome}")
    return 0
