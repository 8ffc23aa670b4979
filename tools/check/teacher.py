"""Check that the repair tasks' expert solves them: from the start, and after ten turns of random commands.

The expert is the program that labels every state. It runs on every task twice: alone, and after a policy has typed
random commands for some turns (edits that apply, edits that do not, undo, shell commands that damage the tree). No
model takes part.

    .venv/bin/python -m tools.check.teacher --tasks 120      a few minutes; needs the packages' sources (cache or index)

It prints the unsolved episodes. The last line is ``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from megatron_dagger.config import LimitsConfig, RepoRepairConfig
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.mixing import MixtureTurnPolicy
from megatron_dagger.driver.context import open_run_context
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.envs.repo_repair.tools.swaps import REPLACEMENTS
from megatron_dagger.recipes import find_recipe
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.types import Trajectory
from tools.support.scripted_policies import RandomPolicy

EDITS = [shlex.join(["edit", f"@{k}", old, new]) for k in range(1, 6) for old, new in sorted(REPLACEMENTS.items())]
COMMANDS = ["locate", "runtests", "undo", "list", "search return", "nonsense", *(f"view @{k}" for k in range(1, 10))]
COMMANDS += [f"fix @{k} {n}" for k in range(1, 6) for n in (1, 2, 3)]
HARM = ["sed -i s/return/pass/ $(git ls-files '*.py')", "rm -rf .repair", "rm -rf tests", "echo x >> new.py"]
# As many other commands as edits, and an eighth as many that do damage.
RANDOM_COMMANDS = [*EDITS, *COMMANDS * (len(EDITS) // len(COMMANDS)), *HARM * (len(EDITS) // len(HARM) // 8)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", type=int, default=300, help="training and held-out tasks together (default %(default)s)"
    )
    parser.add_argument("--random-turns", type=int, default=10, help="random turns (default %(default)s)")
    parser.add_argument(
        "--max-turns",
        type=int,
        default=100,
        help="turn limit of an episode, random turns included (default %(default)s)",
    )
    arguments = parser.parse_args()
    heldout = arguments.tasks // 3
    tasks = RepoRepairConfig(train_tasks=arguments.tasks - heldout, heldout_tasks=heldout)
    config = replace(find_recipe("short_repair")(), repo_repair=tasks)
    with tempfile.TemporaryDirectory(prefix="check-teacher-") as folder:
        create_run(config, Path(folder))
        with open_run_context(config, Path(folder)) as context:
            limits = LimitsConfig(max_turns=arguments.max_turns, max_tokens=8192)
            result = asyncio.run(check(context, limits, arguments.random_turns))
    print("RESULT " + json.dumps(result))
    return 0


async def check(context: RunContext, limits: LimitsConfig, random_turns: int) -> dict[str, object]:
    start = await episodes(context, limits, 0)
    table("from the start", start)
    after = await episodes(context, limits, random_turns)
    table(f"after {random_turns} random turns", after)
    return {
        "tasks": len(start),
        "solved_from_start": round(share_solved(start), 4),
        "median_turns": statistics.median(len(episode.turns) for episode in start),
        "random_turns": random_turns,
        "solved_after_random_turns": round(share_solved(after), 4),
    }


async def episodes(context: RunContext, limits: LimitsConfig, random_turns: int) -> list[Trajectory]:
    """Run an episode of each task, in which the expert acts after ``random_turns`` turns of a random policy."""
    runner = EpisodeRunner(renderer=context.renderer, limits=limits, max_action_tokens=32, threads=context.threads)
    random_policy = RandomPolicy(RANDOM_COMMANDS, context.renderer.action)
    turn_policy = MixtureTurnPolicy(
        student=random_policy, teacher=context.teacher, teacher_acts=lambda turn: turn >= random_turns
    )
    semaphore = asyncio.Semaphore(4)

    async def run_episode(task: str) -> Trajectory:
        async with semaphore:
            key = EpisodeKey(run_seed=1, round_index=1, task_id=task)
            return await runner.run(functools.partial(context.make_env, task), turn_policy, key, 0.0)

    tasks = (*context.train_tasks, *context.heldout_tasks)
    with context.track(f"after {random_turns} random turns", len(tasks)) as progress:
        trajectories = []
        for episode in asyncio.as_completed([run_episode(task) for task in tasks]):
            trajectories.append(await episode)
            progress.advance(note=f"{sum(t.solved for t in trajectories)} solved")
    return trajectories


def share_solved(trajectories: list[Trajectory]) -> float:
    return sum(trajectory.solved for trajectory in trajectories) / len(trajectories)


def table(title: str, trajectories: list[Trajectory]) -> None:
    turns = sorted(len(trajectory.turns) for trajectory in trajectories)
    print(
        f"\n{title}: {share_solved(trajectories):.1%} of {len(trajectories)} tasks solved, "
        f"turns: median {statistics.median(turns):.0f}, maximum {turns[-1]}"
    )
    unsolved = [trajectory for trajectory in trajectories if not trajectory.solved]
    for reason, count in Counter(str(trajectory.stop_reason) for trajectory in unsolved).items():
        print(f"  {count} ended unsolved with {reason}:")
        for trajectory in [t for t in unsolved if str(t.stop_reason) == reason][:5]:
            last = trajectory.turns[-1].action.text
            print(f"    {trajectory.task_id} after {len(trajectory.turns)} turns, the last: {last}")


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
