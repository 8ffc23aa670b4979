"""Run a stage's episodes: one per task, several at a time, each committed as soon as it ends.

A committed episode is never run again. A broken one (its sandbox or engine failed) never becomes data. It is
retried once with the same random draws: if only the machine was at fault, the data are those of an undisturbed run.
Later retries use new draws. After ``TRIES`` the task is abandoned for this round, which the store records. If too
many tasks are abandoned, the run stops instead.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_dagger.config import RunConfig
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.worker import finished_tasks
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner, TurnPolicy
from megatron_dagger.types import Trajectory

if TYPE_CHECKING:
    from megatron_dagger.dagger.stage import Stage

logger = logging.getLogger(__name__)

TRIES = 3  # of an episode that breaks
TOO_MANY, TOO_LARGE_SHARE = 3, 0.1  # abandoned tasks of a stage: this many, and more than this share
COMMIT_EPISODES = 8  # finished episodes that are committed together


class TooManyBroken(RuntimeError):
    """Episodes keep breaking: the environment or the engine is at fault, not the agent."""


def round_tasks(config: RunConfig, tasks: Sequence[str], round_index: int) -> list[str]:
    """Return a round's training tasks: each round continues where the previous one stopped, in a seeded order."""
    first = config.dagger.sft_tasks + (round_index - 1) * config.dagger.tasks_per_round if round_index else 0
    count = config.dagger.tasks_per_round if round_index else config.dagger.sft_tasks
    chosen: list[str] = []
    for position in range(first, first + min(count, len(tasks))):
        epoch, offset = divmod(position, len(tasks))
        chosen.append(_shuffled(tuple(tasks), config.seed + epoch)[offset])
    return sorted(set(chosen))


@functools.lru_cache(maxsize=8)
def _shuffled(tasks: tuple[str, ...], seed: int) -> list[str]:
    order = sorted(tasks)
    random.Random(seed).shuffle(order)
    return order


async def run_episodes(
    context: RunContext, stage: Stage, tasks: Sequence[str], policy: Callable[[EpisodeKey], TurnPolicy]
) -> int:
    """Run an episode for each of ``tasks`` that is not finished, and commit it; return how many tries broke.

    ``tasks`` are all of the stage's, or one worker's share of them. Raises TooManyBroken.
    """
    finished = finished_tasks(stage.store, stage.round_index)
    waiting = [task for task in tasks if task not in finished]
    broken = solved = 0
    clean: list[Trajectory] = []
    with context.track(
        f"round {stage.round_index} {stage.name}",
        len(tasks),
        done=len(tasks) - len(waiting),
        stage=(stage.round_index, stage.name),
    ) as progress:
        try:
            async with aclosing(_stream_episodes(context, stage, waiting, policy)) as episodes:
                async for trajectory, tries in episodes:
                    if trajectory.stop_reason.is_clean:
                        broken += tries - 1
                        solved += trajectory.solved
                        clean.append(trajectory)
                    else:
                        broken += tries
                        _abandon(stage, trajectory, tasks)
                    if len(clean) >= COMMIT_EPISODES:
                        stage.store.append(clean)
                        clean = []
                    progress.advance(note=f"{solved} solved")
        finally:  # also when this process is asked to stop, or another episode cannot be run
            if clean:
                stage.store.append(clean)
    return broken


def _abandon(stage: Stage, last: Trajectory, tasks: Sequence[str]) -> None:
    """Record that the task of ``last`` is skipped this round.

    If too many tasks of an essential stage are skipped, un-skip all of ``tasks`` (they are tried again once the
    environment is fixed) and raise TooManyBroken.
    """
    abandoned = stage.store.abandoned(stage.round_index)
    abandoned.add(last)
    number, total = len(abandoned.tasks()), len(stage.tasks)
    too_many = number == total or (number >= TOO_MANY and number > TOO_LARGE_SHARE * total)
    if too_many and stage.essential:
        abandoned.withdraw(tasks)
        raise TooManyBroken(
            f"{number} of {total} tasks broke {TRIES} times each, the last of them {last.task_id} with "
            f"{last.stop_reason}: {last.details.get('error')}"
        )
    logger.warning("%s is abandoned for this round", last.task_id)


async def _stream_episodes(
    context: RunContext, stage: Stage, tasks: Sequence[str], policy: Callable[[EpisodeKey], TurnPolicy]
) -> AsyncGenerator[tuple[Trajectory, int], None]:
    """Yield ``(trajectory, tries)`` for every task as it finishes. If the trajectory is not clean, all tries broke."""
    config = context.config
    concurrent = config.rollout.concurrent_episodes
    slots = asyncio.Semaphore(concurrent)  # taken in the order of the tasks
    runner = EpisodeRunner(
        renderer=context.renderer,
        limits=config.rollout.limits,
        max_action_tokens=stage.sampling.max_tokens,
        threads=context.threads,
    )
    limits = stage.limits or (lambda task: config.rollout.limits)

    async def run_task(number: int, task: str) -> tuple[Trajectory, int]:
        async with slots:
            context.prefetch(tasks[number + 1 : number + 1 + concurrent])
            for failures in range(TRIES):
                draw = max(0, failures - 1)
                key = EpisodeKey(run_seed=config.seed, round_index=stage.round_index, task_id=task, draw=draw)
                make_env = functools.partial(context.make_env, task)
                limited = replace(runner, limits=limits(task))
                trajectory = await limited.run(make_env, policy(key), key, stage.beta)
                if trajectory.stop_reason.is_clean:
                    return (await stage.score(trajectory) if stage.score else trajectory), failures + 1
                logger.warning("%s broke (%s): %s", task, trajectory.stop_reason, trajectory.details.get("error"))
        return trajectory, TRIES

    running = [asyncio.create_task(run_task(number, task)) for number, task in enumerate(tasks)]
    try:
        for next_finished in asyncio.as_completed(running):
            yield await next_finished
    finally:
        for task_running in running:
            task_running.cancel()
        await asyncio.gather(*running, return_exceptions=True)
