"""Show a run's rounds and stages: progress, rates, and the errors of failed stages.

It reads files only, so it works on any node and while the run runs.
"""

from __future__ import annotations

import argparse

from megatron_dagger.cli.arguments import add_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.driver.episodes import open_store
    from megatron_dagger.driver.run_dir import COLLECTED, load_run_config
    from megatron_dagger.observability.status import status

    load_run_config(arguments.run_dir)  # raises if this is not a run
    print(status(arguments.run_dir, data=open_store(arguments.run_dir, COLLECTED)))
    return 0
