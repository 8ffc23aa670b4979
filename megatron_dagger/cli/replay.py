"""``megatron-dagger replay``: recorded episodes acted again in fresh environments, without a model or a teacher.

What the environment answers is compared, turn by turn, with what it answered then, and so is the verdict: it
shows whether an environment repeats itself, and whether an image, a tool or a judge has changed since.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from megatron_dagger.config import RunConfig
from megatron_dagger.driver.context import cache_dir, load_run_config
from megatron_dagger.driver.environments import Environment, open_environment
from megatron_dagger.driver.preemption import stops_when_asked
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.source import visible
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner, TurnDecision
from megatron_dagger.types import State, Trajectory

_DIFF_LINES = 30


class RecordedTurnPolicy:
    """Does in each turn what was done then. After the last one there is nothing to do: PolicyError."""

    def __init__(self, episode: Trajectory):
        self._turns = episode.turns

    async def decide(self, state: State, turn: int) -> TurnDecision:
        if turn >= len(self._turns):
            raise PolicyError(f"the record ends after {len(self._turns)} turns, this episode has not ended yet")
        then = self._turns[turn]
        return TurnDecision(acted_by=then.acted_by, action=then.action, label=then.label)


@stops_when_asked()
def replay(run_dir: Path, episodes: Sequence[Trajectory]) -> int:
    """Print what differs; 0 when every episode ends as it did then, 1 otherwise."""
    config, ended_otherwise = load_run_config(run_dir), 0
    with ExitStack() as stack:
        environment = open_environment(config, run_dir, cache_dir(), track, stack)
        again = asyncio.run(_act_again(config, run_dir, environment, episodes))
    for then, now in zip(episodes, again, strict=True):
        differing = differing_turns(then, now)
        same = (then.stop_reason, then.solved) == (now.stop_reason, now.solved)
        ended_otherwise += not same
        answers = f"{len(differing)} of {len(then.turns)} answers differ" if differing else "all answers as then"
        ending = "ended as then" if same else f"{_ending(then)} then, {_ending(now)} now"
        print(f"{visible(then.task_id):60}  {answers}, {ending}")
        if differing and len(episodes) == 1:
            _print_difference(then, now, differing[0])
    return int(ended_otherwise > 0)


def differing_turns(then: Trajectory, now: Trajectory) -> list[int]:
    """The turns, from 0, in which something else was seen, or which only one of the two has."""
    pairs = zip(then.turns, now.turns, strict=False)
    found = [number for number, (a, b) in enumerate(pairs) if a.observation != b.observation]
    fewest, most = sorted((len(then.turns), len(now.turns)))
    return [*found, *range(fewest, most)]


async def _act_again(
    config: RunConfig, run_dir: Path, environment: Environment, episodes: Sequence[Trajectory]
) -> list[Trajectory]:
    places = asyncio.Semaphore(config.rollout.concurrent_episodes)
    with (
        ThreadPoolExecutor(environment.threads, thread_name_prefix="sandbox") as threads,
        track("replay", len(episodes)) as progress,
    ):
        runner = EpisodeRunner(
            renderer=ChatRenderer.load(run_dir / "student"),
            limits=config.rollout.limits,
            max_action_tokens=config.rollout.sampling.max_tokens,
            threads=threads,
        )

        async def one(then: Trajectory) -> Trajectory:
            key = EpisodeKey(run_seed=config.seed, round_index=then.round_index, task_id=then.task_id)
            async with places:
                now = await runner.run(
                    lambda: environment.make_env(then.task_id), RecordedTurnPolicy(then), key, then.beta
                )
            progress.advance()
            return now

        return await asyncio.gather(*map(one, episodes))


def _ending(episode: Trajectory) -> str:
    why = episode.details.get("error", "") if not episode.stop_reason.is_clean else ""
    return f"{'solved' if episode.solved else 'not solved'} ({episode.stop_reason}{': ' if why else ''}{why})"


def _print_difference(then: Trajectory, now: Trajectory, turn: int) -> None:
    a, b = ([t.observation for t in one.turns[turn : turn + 1]] or [""] for one in (then, now))
    lines = difflib.unified_diff(
        visible(a[0]).splitlines(), visible(b[0]).splitlines(), f"turn {turn + 1} then", "now", lineterm="", n=1
    )
    print(*list(lines)[:_DIFF_LINES], sep="\n")
