"""``python -m megatron_dagger.training EPISODES.npz JOB.json ...``: one rank of one or more training rounds.

A job is a TrainJob; the episodes are a file of ``data.episode_file.save_episodes``. The rank comes from torchrun's
variables: without them one process trains alone, and ``ranks.launch`` or torchrun start several.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from megatron_dagger.training.data.episode_file import load_episodes
from megatron_dagger.training.job import TrainJob


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dagger.training",
        description="Train one or more rounds on a file of labelled episodes, as one rank of each.",
    )
    parser.add_argument("episodes", type=Path, help="the .npz file of training.data.episode_file.save_episodes")
    parser.add_argument("jobs", type=Path, nargs="+", help="TrainJobs as JSON, all with the same world_size")
    arguments = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING,
        format="%(asctime)s %(name)s %(message)s",
    )
    from megatron_dagger.training import compat

    compat.quiet()
    from megatron_dagger.training.trainer import train_round

    episodes = load_episodes(arguments.episodes)
    try:
        for job in arguments.jobs:
            train_round(TrainJob.load(job), lambda: episodes)
    except ValueError as error:  # settings or data: the message says what to change
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
