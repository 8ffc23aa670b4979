"""Check the teacher of the long repairs: its success and turns from the start and after random turns.

    .venv/bin/python -m tools.check.long_repairs                      every horizon, 40 held-out tasks each
    .venv/bin/python -m tools.check.long_repairs --bugs 8 --tasks 100

After random turns: ten turns in a row, somewhere in the episode, are drawn from commands that a student may say by
mistake (tools/support/slips.py). The last line is ``RESULT {json}``; the exit code is 1 if a share is below its aim.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_dagger.driver.environments import open_environment
from megatron_dagger.driver.run_dir import cache_dir
from megatron_dagger.envs.environment import Environment
from megatron_dagger.envs.repo_repair.long.expert import next_command
from megatron_dagger.envs.repo_repair.long.tasks import COMMENT
from megatron_dagger.observability.progress import track
from megatron_dagger.recipes import find_recipe
from megatron_dagger.types import Message
from tools.support.slips import slip

RANDOM_TURNS = 10
AIMS = {"from_start": 0.99, "after_random_turns": 0.95}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bugs", type=int, nargs="+", default=[1, 2, 4, 8], help="horizons (default %(default)s)")
    parser.add_argument("--tasks", type=int, default=40, help="held-out tasks of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the tasks and draws (default %(default)s)")
    arguments = parser.parse_args()
    result = {str(bugs): check(bugs, arguments.tasks, arguments.seed) for bugs in arguments.bugs}
    for bugs, values in result.items():
        print(f"{bugs} bugs: {values}")
    print("RESULT " + json.dumps(result))
    return 0 if all(values[name] >= aim for values in result.values() for name, aim in AIMS.items()) else 1


def check(bugs: int, tasks: int, seed: int) -> dict[str, Any]:
    """Return the teacher's shares of solved tasks and its median turns from the start."""
    recipe = find_recipe("long_repair")()
    repair = replace(recipe.repo_repair, bugs=bugs, train_tasks=1, heldout_tasks=tasks)
    config = replace(recipe, repo_repair=repair, seed=seed)
    with ExitStack() as stack:
        environment = open_environment(config, Path(), cache_dir(), track, stack)
        result: dict[str, Any] = {"tasks": len(environment.heldout_tasks)}
        with track(f"{bugs} bugs", 2 * len(environment.heldout_tasks), unit="episodes") as progress:
            for name, disturbed in (("from_start", False), ("after_random_turns", True)):
                outcomes = []
                for task in environment.heldout_tasks:
                    outcomes.append(play(environment, task, bugs, random.Random(f"{seed}:{task}"), disturbed=disturbed))
                    progress.advance()
                result[name] = statistics.fmean(solved for solved, _ in outcomes)
                if not disturbed:
                    result["median_turns"] = statistics.median(turns for _, turns in outcomes)
    return result


def play(environment: Environment, task: str, bugs: int, chance: random.Random, *, disturbed: bool) -> tuple[bool, int]:
    """Let the teacher work on a task, disturbed by random turns or not; return whether it is solved, and the turns."""
    first = chance.randrange(5 * bugs) if disturbed else -RANDOM_TURNS
    limit = 3 * (10 * bugs + 10) + RANDOM_TURNS
    with environment.make_env(task) as env:
        system, problem = env.reset()
        messages = [Message(role="system", content=system), Message(role="user", content=problem)]
        files = ["todo/list"]
        for turn in range(limit):
            command = next_command(tuple(messages))
            if first <= turn < first + RANDOM_TURNS:
                command = slip(command, files, chance)
            observation = env.step(command)
            if observation.done:
                break
            messages += [
                Message(role="assistant", content=command),
                Message(role="user", content=observation.text),
            ]
            if match := COMMENT.fullmatch(observation.text):
                files.append(match["path"])
        return env.judge(), turn + 1


if __name__ == "__main__":
    sys.exit(main())
