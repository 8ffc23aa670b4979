"""How often the repair tasks' teacher succeeds: from the start, and after ten random turns.

The teacher is the expert program that labels every state. It is run on every training and held-out
task, once alone and once after a policy that types random commands (edits that fit, edits that do
not, undo, shell commands that break the tree) has acted for some turns. No model takes part.

    tools/check/teacher.py --tasks 300
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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dagger.config import LimitsConfig, RepoRepairConfig
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.mixing import MixtureTurnPolicy
from megatron_dagger.driver.context import create_run, open_run_context
from megatron_dagger.envs.repo_repair.tools.swaps import REPLACEMENTS
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner
from megatron_dagger.types import Trajectory
from recipes import find_recipe
from tools.support.scripted_policies import RandomPolicy

EDITS = [shlex.join(["edit", f"@{k}", old, new]) for k in range(1, 6) for old, new in sorted(REPLACEMENTS.items())]
PLAIN = ["locate", "runtests", "undo", "list", "search return", "nonsense", *(f"view @{k}" for k in range(1, 10))]
PLAIN += [f"fix @{k} {n}" for k in range(1, 6) for n in (1, 2, 3)]
HARM = ["sed -i s/return/pass/ $(git ls-files '*.py')", "rm -rf .repair", "rm -rf tests", "echo x >> new.py"]
RANDOM_COMMANDS = [*EDITS, *PLAIN * (len(EDITS) // len(PLAIN)), *HARM * (len(EDITS) // len(HARM) // 8)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=300, help="training and held-out tasks together")
    parser.add_argument("--random-turns", type=int, default=10)
    parser.add_argument("--max-turns", type=int, default=100, help="of an episode, random turns included")
    arguments = parser.parse_args()
    heldout = arguments.tasks // 3
    sides = RepoRepairConfig(train_tasks=arguments.tasks - heldout, heldout_tasks=heldout)
    config = replace(find_recipe("quickstart")(), repo_repair=sides)
    with tempfile.TemporaryDirectory(prefix="check-teacher-") as folder:
        create_run(config, Path(folder))
        with open_run_context(config, Path(folder)) as parts:
            limits = LimitsConfig(max_turns=arguments.max_turns, max_tokens=8192)
            result = asyncio.run(check(parts, limits, arguments.random_turns))
    print("RESULT " + json.dumps(result))
    return 0


async def check(parts: RunContext, limits: LimitsConfig, random_turns: int) -> dict[str, object]:
    start = await episodes(parts, limits, 0)
    table("from the start", start)
    after = await episodes(parts, limits, random_turns)
    table(f"after {random_turns} random turns", after)
    return {
        "tasks": len(start),
        "solved_from_start": round(share_solved(start), 4),
        "median_turns": statistics.median(len(episode.turns) for episode in start),
        "random_turns": random_turns,
        "solved_after_random_turns": round(share_solved(after), 4),
    }


async def episodes(parts: RunContext, limits: LimitsConfig, random_turns: int) -> list[Trajectory]:
    """One episode of each task; the teacher acts after ``random_turns`` turns of a random policy."""
    runner = EpisodeRunner(renderer=parts.renderer, limits=limits, max_action_tokens=32, threads=parts.threads)
    chaos = RandomPolicy(RANDOM_COMMANDS, parts.renderer.action)
    actor = MixtureTurnPolicy(student=chaos, teacher=parts.teacher, teacher_acts=lambda turn: turn >= random_turns)
    places = asyncio.Semaphore(4)

    async def one(task: str) -> Trajectory:
        async with places:
            key = EpisodeKey(run_seed=1, round_index=1, task_id=task)
            return await runner.run(functools.partial(parts.make_env, task), actor, key, 0.0)

    tasks = (*parts.train_tasks, *parts.heldout_tasks)
    with parts.track(f"after {random_turns} random turns", len(tasks)) as progress:
        found = []
        for ended in asyncio.as_completed([one(task) for task in tasks]):
            found.append(await ended)
            progress.advance(note=f"{sum(e.solved for e in found)} solved")
    return found


def share_solved(found: list[Trajectory]) -> float:
    return sum(episode.solved for episode in found) / len(found)


def table(title: str, found: list[Trajectory]) -> None:
    turns = sorted(len(episode.turns) for episode in found)
    print(
        f"\n{title}: {share_solved(found):.1%} of {len(found)} tasks solved, "
        f"turns: median {statistics.median(turns):.0f}, most {turns[-1]}"
    )
    for reason, count in Counter(str(e.stop_reason) for e in found if not e.solved).items():
        print(f"  {count} ended unsolved by {reason}:")
        for episode in [e for e in found if not e.solved and str(e.stop_reason) == reason][:5]:
            print(f"    {episode.task_id} after {len(episode.turns)} turns, last: {episode.turns[-1].action.text}")


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
