"""Collecting a round: the mixture acts on the round's tasks, every state is labelled, episodes commit.

An episode is committed as soon as it has ended; what is committed is never run again. A broken one
(its sandbox or engine failed) never becomes data. It is tried once more as it was, for the machine may have been
at fault and the data are then those of an undisturbed run, and after that with other draws. After ``TRIES`` its
task is given up for this round, which the store keeps. Where too many are, the run stops instead.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from megatron_dagger.config import RunConfig, SamplingConfig
from megatron_dagger.dagger.context import EpisodeStore, RunContext, Score
from megatron_dagger.dagger.worker import finished_tasks
from megatron_dagger.rollout.episode import EpisodeKey, EpisodeRunner, TurnPolicy
from megatron_dagger.store.abandoned import AbandonedTasks
from megatron_dagger.types import Trajectory

logger = logging.getLogger(__name__)

TRIES = 3  # of an episode that breaks
TOO_MANY, TOO_LARGE_SHARE = 3, 0.1  # of a stage's tasks given up: that many, and more than this share
COMMIT_EPISODES = 8  # at most so many finished episodes wait for their commit


class TooManyBroken(RuntimeError):
    """Episodes keep breaking: the environment or the engine is at fault, not the agent."""


def round_tasks(config: RunConfig, tasks: Sequence[str], round_index: int) -> list[str]:
    """The training tasks of a round: each round takes on where the last one ended, in a seeded order."""
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
    context: RunContext,
    store: EpisodeStore,
    round_index: int,
    tasks: Sequence[str],
    actor: Callable[[EpisodeKey], TurnPolicy],
    sampling: SamplingConfig,
    *,
    beta: float,
    stage: str,
    all_tasks: int,
    score: Score | None = None,
) -> int:
    """Run one episode for each task that has not ended yet, and ``score`` it; the number that broke.

    ``all_tasks``: how many tasks the stage has, with the other workers'. Raises TooManyBroken.
    """
    done = finished_tasks(store, round_index)
    waiting = [task for task in tasks if task not in done]
    runner = EpisodeRunner(
        renderer=context.renderer,
        limits=context.config.rollout.limits,
        max_action_tokens=sampling.max_tokens,
        threads=context.threads,
    )
    broken = solved = 0
    clean: list[Trajectory] = []
    with context.track(
        f"round {round_index} {stage}",
        len(tasks),
        done=len(tasks) - len(waiting),
        run_dir=context.run_dir,
        round_index=round_index,
        stage=stage,
    ) as progress:
        try:
            async with aclosing(_stream_episodes(context, runner, round_index, waiting, actor, beta, score)) as endings:
                async for trajectory, tries in endings:
                    broken += tries - trajectory.stop_reason.is_clean
                    if trajectory.stop_reason.is_clean:
                        solved += trajectory.solved
                        clean.append(trajectory)
                    else:
                        _give_up(store.given_up(round_index), trajectory, tasks, all_tasks)
                    if len(clean) >= COMMIT_EPISODES:
                        store.append(clean)
                        clean = []
                    progress.advance(note=f"{solved} solved")
        finally:  # also when this process is asked to stop, or another episode cannot be run
            if clean:
                store.append(clean)
    return broken


def _give_up(given_up: AbandonedTasks, last: Trajectory, tasks: Sequence[str], all_tasks: int) -> None:
    """Give up the task of ``last``, or none of ``tasks`` and raise TooManyBroken."""
    given_up.add(last)
    number = len(given_up.tasks())
    if number == all_tasks or (number >= TOO_MANY and number > TOO_LARGE_SHARE * all_tasks):
        given_up.withdraw(tasks)  # the environment is to be mended; then they are tried again
        raise TooManyBroken(
            f"{number} of {all_tasks} tasks broke {TRIES} times each, the last of them {last.task_id} with "
            f"{last.stop_reason}: {last.details.get('error')}"
        )
    logger.warning("%s is given up for this round", last.task_id)


async def _stream_episodes(
    context: RunContext,
    runner: EpisodeRunner,
    round_index: int,
    tasks: Sequence[str],
    actor: Callable[[EpisodeKey], TurnPolicy],
    beta: float,
    score: Score | None,
) -> AsyncGenerator[tuple[Trajectory, int], None]:
    """Each task's episode, in the order in which they end, and its tries; one that is not clean broke in all."""
    at_once = context.config.rollout.concurrent_episodes
    places = asyncio.Semaphore(at_once)  # given in the order of the tasks

    async def one(number: int, task: str) -> tuple[Trajectory, int]:
        async with places:
            context.prefetch(tasks[number + 1 : number + 1 + at_once])
            for broke in range(TRIES):
                draw = max(0, broke - 1)
                key = EpisodeKey(run_seed=context.config.seed, round_index=round_index, task_id=task, draw=draw)
                trajectory = await runner.run(functools.partial(context.make_env, task), actor(key), key, beta)
                if trajectory.stop_reason.is_clean:
                    return trajectory if score is None else await score(trajectory), broke + 1
                logger.warning("%s broke (%s): %s", task, trajectory.stop_reason, trajectory.details.get("error"))
        return trajectory, TRIES

    running = [asyncio.create_task(one(number, task)) for number, task in enumerate(tasks)]
    try:
        for next_ended in asyncio.as_completed(running):
            yield await next_ended
    finally:
        for task_running in running:
            task_running.cancel()
        await asyncio.gather(*running, return_exceptions=True)
