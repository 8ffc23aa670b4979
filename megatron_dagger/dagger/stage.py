"""The steps that collection and evaluation share.

Sync the weights, run one episode per task and what follows from them, wait for the other workers, seal the round,
write the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megatron_dagger.config import LimitsConfig, SamplingConfig, build
from megatron_dagger.dagger.collect import run_episodes
from megatron_dagger.dagger.context import RunContext, Score, train_dir, train_manifest
from megatron_dagger.dagger.worker import Worker, finished_tasks, recorded_by_workers, wait_for_workers
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.episode import EpisodeKey, TurnPolicy
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights.verify.canary import Canary

if TYPE_CHECKING:
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.store.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of one round: its tasks, who acts in them, the store of its episodes and the report's summary.

    A stage may have others ``then`` follow before its report, which need no student and have no report of their own.
    """

    name: Literal["collect", "evaluate", "references", "takeovers"]
    round_index: int
    store: DataStore
    tasks: Sequence[str]  # of all workers
    weight_version: int  # the round whose weights the student acts with; -1: there is no student yet
    sampling: SamplingConfig
    beta: float
    turn_policy: Callable[[Policy | None, EpisodeKey], TurnPolicy]  # of the student, which is None before round 1
    summary: Callable[[Manifest], dict[str, Any]] = lambda manifest: {}  # of the sealed round
    score: Score | None = None
    limits: Callable[[str], LimitsConfig] | None = None  # by task; None: rollout.limits
    essential: bool = True  # the run stops if too many tasks are abandoned
    then: Callable[[Sequence[str]], Sequence[Stage]] = lambda tasks: ()  # for tasks of it that are finished


async def run_stage(context: RunContext, stage: Stage, worker: Worker | None = None) -> None:
    """Run a stage to its report, or do one worker's part of it. A stage that has its report is skipped.

    Raises TooManyBroken, TimeoutError if the other workers do not finish, and what ``Student.sync`` raises.
    """
    report = context.round_dir(stage.round_index) / f"{stage.name}.json"
    if report.exists():
        return
    started = time.monotonic()
    tasks = worker.share(stage.tasks) if worker else stage.tasks
    broken = await _play(context, stage, tasks)
    for follower in stage.then(tasks):
        await _play(context, follower, follower.tasks)
    duration_s = time.monotonic() - started
    deadline_s = context.config.rollout.stage_deadline_s
    if worker:
        worker.record(report, broken_episodes=broken, duration_s=duration_s)
        if not await wait_for_workers(worker, stage.store, stage.round_index, stage.tasks, deadline_s):
            return
        broken, duration_s = 0, 0.0  # they are in the worker's record
    for follower in stage.then(stage.tasks):
        if worker:
            await wait_for_workers(worker, follower.store, follower.round_index, follower.tasks, deadline_s)
        if follower.store.committed(follower.round_index):
            follower.store.seal(follower.round_index)
    manifest = stage.store.seal(stage.round_index)
    workers_broken, workers_s = recorded_by_workers(report)
    values = stage.summary(manifest) | {
        "weight_version": stage.weight_version,
        "broken_episodes": broken + workers_broken,
        "duration_s": duration_s + workers_s,
    }
    context.metrics.record(stage.round_index, stage.name, values)
    write_json(report, {"round": stage.round_index, **values})


async def _play(context: RunContext, stage: Stage, tasks: Sequence[str]) -> int:
    """Run the episodes of ``tasks`` that are not finished; return how many tries broke."""
    finished = finished_tasks(stage.store, stage.round_index)
    waiting = [task for task in tasks if task not in finished]
    if not waiting:
        return 0
    # Before the engine starts: an environment that cannot be opened fails at once
    context.prefetch(waiting[: context.config.rollout.concurrent_episodes])
    student = None
    if stage.weight_version >= 0:
        sync(context, stage.weight_version)
        student = context.student().with_sampling(stage.sampling)
    return await run_episodes(context, stage, tasks, lambda key: stage.turn_policy(student, key))


def sync(context: RunContext, round_index: int) -> None:
    """Load a round's weights into the rollout engine, verified tensor by tensor and by a canary's log-probs."""
    manifest = read_json(train_manifest(context.run_dir, round_index))
    canary = build(Canary, manifest["canary"])
    checkpoint = train_dir(context.run_dir, round_index) / manifest["checkpoint"]
    context.student().sync(checkpoint, round_index, manifest["digests"], canary)
