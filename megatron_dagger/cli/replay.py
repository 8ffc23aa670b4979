"""Re-execute a recorded episode's actions and compare the environment's responses.

No model is needed. Every observation and the verdict are compared with the recorded ones. A difference shows that an
environment is not deterministic, or that an image, a tool or a judge has changed since.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from megatron_dagger.cli.arguments import add_episode_filter, add_run, chosen_episodes
from megatron_dagger.config import RunConfig
from megatron_dagger.driver.environments import open_environment
from megatron_dagger.driver.preemption import stop_on_signals
from megatron_dagger.driver.run_dir import cache_dir, load_run_config
from megatron_dagger.envs.environment import Environment
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.sanitize import sanitize
from megatron_dagger.policies.base import NoAction, PolicyError
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner, TurnDecision
from megatron_dagger.types import State, StopReason, Trajectory

_DIFF_LINES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    add_episode_filter(parser)
    parser.add_argument("--all", action="store_true", help="all matching episodes, not only the first")


@stop_on_signals()
def main(arguments: argparse.Namespace) -> int:
    """Print the differences; return 0 if every episode ends as it was recorded, 1 otherwise."""
    episodes = chosen_episodes(arguments)
    return replay(arguments.run_dir, list(itertools.islice(episodes, None if arguments.all else 1)))


def replay(run_dir: Path, recorded: Sequence[Trajectory]) -> int:
    """Re-execute episodes of a run and print the differences; return the command's exit code."""
    config = load_run_config(run_dir)
    with ExitStack() as stack:
        environment = open_environment(config, run_dir, cache_dir(), track, stack)
        replayed = asyncio.run(_replay_all(config, run_dir, environment, recorded))
    return _print_comparison(recorded, replayed)


class RecordedTurnPolicy:
    """Repeat the recorded turns. Raises PolicyError after the last one: the episode should have ended."""

    def __init__(self, episode: Trajectory):
        self._turns, self._stop_reason = episode.turns, episode.stop_reason

    async def decide(self, state: State, turn: int) -> TurnDecision:
        if turn >= len(self._turns) and self._stop_reason is StopReason.NO_ACTION:
            raise NoAction("the teacher had none here")
        if turn >= len(self._turns):
            raise PolicyError(f"the record ends after {len(self._turns)} turns, this episode has not ended yet")
        recorded = self._turns[turn]
        return TurnDecision(acted_by=recorded.acted_by, action=recorded.action, label=recorded.label)


def differing_turns(recorded: Trajectory, replayed: Trajectory) -> list[int]:
    """Return the turns, from 0, whose observations differ or which only one of the two has."""
    pairs = zip(recorded.turns, replayed.turns, strict=False)
    differing = [number for number, (a, b) in enumerate(pairs) if a.observation != b.observation]
    shorter, longer = sorted((len(recorded.turns), len(replayed.turns)))
    return [*differing, *range(shorter, longer)]


async def _replay_all(
    config: RunConfig, run_dir: Path, environment: Environment, episodes: Sequence[Trajectory]
) -> list[Trajectory]:
    slots = asyncio.Semaphore(config.rollout.concurrent_episodes)
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

        async def replay_one(recorded: Trajectory) -> Trajectory:
            key = EpisodeKey(run_seed=config.seed, round_index=recorded.round_index, task_id=recorded.task_id)
            async with slots:
                replayed = await runner.run(
                    lambda: environment.make_env(recorded.task_id), RecordedTurnPolicy(recorded), key, recorded.beta
                )
            progress.advance()
            return replayed

        return await asyncio.gather(*map(replay_one, episodes))


def _print_comparison(recorded: Sequence[Trajectory], replayed: Sequence[Trajectory]) -> int:
    different_endings = 0
    for old, new in zip(recorded, replayed, strict=True):
        differing = differing_turns(old, new)
        same_ending = (old.stop_reason, old.solved) == (new.stop_reason, new.solved)
        different_endings += not same_ending
        observations = f"{len(differing)} of {len(old.turns)} observations differ" if differing else "same observations"
        ending = "same ending" if same_ending else f"recorded: {_ending(old)}, now: {_ending(new)}"
        print(f"{sanitize(old.task_id):60}  {observations}, {ending}")
        if differing and len(recorded) == 1:
            _print_difference(old, new, differing[0])
    return int(different_endings > 0)


def _ending(episode: Trajectory) -> str:
    error = episode.details.get("error", "") if not episode.stop_reason.is_clean else ""
    return f"{'solved' if episode.solved else 'not solved'} ({episode.stop_reason}{': ' if error else ''}{error})"


def _print_difference(recorded: Trajectory, replayed: Trajectory, turn: int) -> None:
    old, new = ([t.observation for t in e.turns[turn : turn + 1]] or [""] for e in (recorded, replayed))
    lines = difflib.unified_diff(
        sanitize(old[0]).splitlines(),
        sanitize(new[0]).splitlines(),
        f"turn {turn + 1}, recorded",
        "now",
        lineterm="",
        n=1,
    )
    print(*list(lines)[:_DIFF_LINES], sep="\n")
