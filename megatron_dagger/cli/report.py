"""Write one self-contained HTML page about a run: curves, tables and browsable episodes."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dagger.cli.arguments import add_run
from megatron_dagger.config.base import require

EPISODES = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the file to write (default: RUN/report.html)")
    parser.add_argument("--episodes", type=int, default=EPISODES, help=f"episodes to include (default: {EPISODES})")


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.driver.run_dir import load_run_config

    load_run_config(arguments.run_dir)  # raises if this is not a run
    out, episodes = arguments.out, arguments.episodes
    require(out is None or not out.is_dir(), f"--out {out} is a directory; name the file to write")
    require(episodes >= 0, f"--episodes {episodes} must not be negative")
    return write(arguments.run_dir, out, episodes)


def write(run_dir: Path, out: Path | None = None, episodes: int = EPISODES) -> int:
    """Write the page and print its path."""
    from megatron_dagger.driver.episodes import open_store
    from megatron_dagger.driver.run_dir import COLLECTED, EVALUATED
    from megatron_dagger.observability.report import write_report

    data, evaluations = open_store(run_dir, COLLECTED), open_store(run_dir, EVALUATED)
    print(write_report(run_dir, data=data, evaluations=evaluations, path=out, max_episodes=episodes))
    return 0
