"""DAgger on one screen: rounds of collect, label, aggregate, train, sync, evaluate.

Every stage reads files and ends by writing its own manifest atomically. A stage whose manifest is
there is not run again, so the same command carries on wherever a killed run was.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from megatron_dagger.config import build
from megatron_dagger.dagger.aggregation import summarise
from megatron_dagger.dagger.beta import beta
from megatron_dagger.dagger.collect import round_tasks, run_episodes
from megatron_dagger.dagger.context import RunContext, train_dir, train_manifest
from megatron_dagger.dagger.mixing import MixtureTurnPolicy, SoloTurnPolicy, mixture
from megatron_dagger.dagger.worker import Worker, all_finished, recorded_by_workers, wait_for_workers
from megatron_dagger.evaluation.success import success
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.rollout.episode import EpisodeKey, TurnPolicy
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights.verify.canary import Canary


async def run_rounds(context: RunContext) -> None:
    """Round 0 is SFT on the teacher's episodes; then N rounds on the states that the student visits."""
    for round_index in range(context.config.dagger.rounds + 1):
        await collect(context, round_index)
        if not train_manifest(context.run_dir, round_index).exists():
            context.student()  # it gets ready while the trainer works
        train(context, round_index)
        await evaluate(context, round_index)


async def collect(context: RunContext, round_index: int, worker: Worker | None = None) -> None:
    """Let the mixture act on the round's tasks, label every visited state, seal the round.

    One ``worker`` of several does its share of the tasks and, unless it is one that seals, seals nothing:
    collecting once more, with no worker, does what is missing and seals.
    """
    report = context.round_dir(round_index) / "collect.json"
    if report.exists():
        return
    started, config = time.monotonic(), context.config
    share = beta(config.dagger.beta, round_index)
    all_tasks = round_tasks(config, context.train_tasks, round_index)
    tasks = worker.share(all_tasks) if worker else all_tasks
    student = None
    if round_index and not all_finished(context.data, round_index, tasks):
        sync(context, round_index - 1)
        student = context.student().with_sampling(config.rollout.sampling)

    def actor(key: EpisodeKey) -> TurnPolicy:
        acts = mixture(config.dagger, share, key)
        return MixtureTurnPolicy(student=student, teacher=context.teacher, teacher_acts=acts)

    broken = 0
    if context.data.manifest(round_index) is None:
        broken = await run_episodes(
            context,
            context.data,
            round_index,
            tasks,
            actor,
            config.rollout.sampling,
            beta=share,
            stage="collect",
            all_tasks=len(all_tasks),
            score=context.score,
        )
    duration_s = time.monotonic() - started
    if worker:
        worker.record(report.parent, broken_episodes=broken, duration_s=duration_s)
        broken, duration_s = 0, 0.0
    if not await wait_for_workers(worker, context.data, round_index, all_tasks, config.rollout.stage_deadline_s):
        return
    manifest = context.data.seal(round_index)
    workers_broken, workers_s = recorded_by_workers(report.parent)
    values = summarise(context.data.episodes(round_index)) | {
        "beta": share,
        "broken_episodes": broken + workers_broken,
        "given_up": len(context.data.given_up(round_index).tasks()),
        "weight_version": round_index - 1,
        "digest": manifest.digest,
        "duration_s": workers_s + duration_s,
    }
    write_json(report, {"round": round_index, **values})
    context.metrics.record(round_index, "collect", values)


def train(context: RunContext, round_index: int) -> None:
    """Train the student on the aggregated labels, from the last round's weights."""
    manifest = train_manifest(context.run_dir, round_index)
    if not manifest.exists():
        context.train(round_index)
    values = read_json(manifest)
    shown = {name: value for name, value in values.items() if name not in ("round", "digests", "canary", "checkpoint")}
    steps = read_lines(train_dir(context.run_dir, round_index) / "metrics.jsonl")
    context.metrics.record(round_index, "train", shown, steps=steps)


def sync(context: RunContext, round_index: int) -> None:
    """Bring the weights trained in a round to the rollout workers, proven tensor by tensor and by a canary."""
    manifest = read_json(train_manifest(context.run_dir, round_index))
    canary = build(Canary, manifest["canary"])
    checkpoint = train_dir(context.run_dir, round_index) / manifest["checkpoint"]
    context.student().sync(checkpoint, round_index, manifest["digests"], canary)


async def evaluate(context: RunContext, round_index: int, worker: Worker | None = None) -> None:
    """Let the student alone work on the held-out tasks, and on some training tasks where asked.

    ``worker``: as in ``collect``.
    """
    report = context.round_dir(round_index) / "evaluate.json"
    skipped = context.config.dagger.evaluate_rounds == "last" and round_index < context.config.dagger.rounds
    if report.exists() or skipped:
        return
    started, config = time.monotonic(), context.config
    heldout = list(itertools.islice(context.heldout_tasks, config.dagger.evaluation_tasks))
    trained = list(itertools.islice(context.train_tasks, config.dagger.evaluation_train_tasks))
    tasks = worker.share(heldout + trained) if worker else heldout + trained
    if not all_finished(context.evaluations, round_index, tasks):
        sync(context, round_index)
        sampling = config.evaluation_sampling
        actor = SoloTurnPolicy(policy=context.student().with_sampling(sampling))
        await run_episodes(
            context,
            context.evaluations,
            round_index,
            tasks,
            lambda key: actor,
            sampling,
            beta=0.0,
            stage="evaluate",
            all_tasks=len(heldout + trained),
        )
    if not await wait_for_workers(
        worker, context.evaluations, round_index, heldout + trained, config.rollout.stage_deadline_s
    ):
        return
    context.evaluations.seal(round_index)
    episodes, given_up = (
        list(context.evaluations.episodes(round_index)),
        context.evaluations.given_up(round_index).tasks(),
    )

    def of(tasks: list[str]) -> dict[str, Any]:
        return success([e for e in episodes if e.task_id in set(tasks)], given_up=len(given_up.intersection(tasks)))

    values = {
        "weight_version": round_index,
        "heldout": of(heldout),
        "train": of(trained) if trained else None,
        "duration_s": time.monotonic() - started,
    }
    write_json(report, {"round": round_index, **values})
    context.metrics.record(round_index, "evaluate", values)
