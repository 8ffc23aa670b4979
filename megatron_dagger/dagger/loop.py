"""DAgger: rounds of collect (with labels), train, sync and evaluate.

Every stage reads files and ends by writing its own manifest atomically. A stage that has its manifest is
skipped, so repeating the command of a killed run resumes it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from megatron_dagger.dagger.aggregation import summarise
from megatron_dagger.dagger.beta import beta
from megatron_dagger.dagger.collect import round_tasks
from megatron_dagger.dagger.context import RunContext, train_dir, train_manifest
from megatron_dagger.dagger.diagnose import diagnosis_stages, drift_summary, evaluation_policy
from megatron_dagger.dagger.mixing import MixtureTurnPolicy, mixture
from megatron_dagger.dagger.stage import Stage, run_stage
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.evaluation.success import success
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.episode import EpisodeKey, TurnPolicy
from megatron_dagger.store.atomic import read_json

if TYPE_CHECKING:
    from megatron_dagger.store.manifest import Manifest


async def run_rounds(context: RunContext) -> None:
    """Run round 0, which is SFT on the teacher's episodes, and then N rounds on the student's own states."""
    for round_index in range(context.config.dagger.rounds + 1):
        await collect(context, round_index)
        if not train_manifest(context.run_dir, round_index).exists():
            context.start_student()  # its engine starts while the trainer works
        train(context, round_index)
        await evaluate(context, round_index)


async def collect(context: RunContext, round_index: int, worker: Worker | None = None) -> None:
    """Run the round's tasks with student and teacher mixed, label every visited state, and seal the round.

    A ``worker`` collects its share of the tasks and leaves the sealing to a later call without one.
    """
    config, store = context.config, context.data
    share = beta(config.dagger.beta, round_index)

    def turn_policy(student: Policy | None, key: EpisodeKey) -> TurnPolicy:
        acts = mixture(config.dagger, share, key)
        return MixtureTurnPolicy(
            student=student,
            teacher=context.teacher,
            teacher_acts=acts,
            takeover_turns=config.dagger.takeover_turns,
        )

    def summary(manifest: Manifest) -> dict[str, Any]:
        return summarise(store.episodes(round_index)) | {
            "beta": share,
            "given_up": len(store.abandoned(round_index).tasks()),
            "digest": manifest.digest,
        }

    stage = Stage(
        name="collect",
        round_index=round_index,
        store=store,
        tasks=round_tasks(config, context.train_tasks, round_index),
        weight_version=round_index - 1,  # -1: round 0 needs no student
        sampling=config.rollout.sampling,
        beta=share,
        turn_policy=turn_policy,
        score=context.score,
        summary=summary,
    )
    await run_stage(context, stage, worker)


def train(context: RunContext, round_index: int) -> None:
    """Train the student on the aggregated labels, starting from the previous round's weights."""
    manifest = train_manifest(context.run_dir, round_index)
    if not manifest.exists():
        context.train(round_index)
    values = read_json(manifest)
    shown = {name: value for name, value in values.items() if name not in ("round", "digests", "canary", "checkpoint")}
    steps = read_lines(train_dir(context.run_dir, round_index) / "metrics.jsonl")
    context.metrics.record(round_index, "train", shown, steps=steps)


async def evaluate(context: RunContext, round_index: int, worker: Worker | None = None) -> None:
    """Run the student alone on the held-out tasks, and on some training tasks if the settings say so.

    Then diagnose how it drifts from the teacher's path (see ``diagnose``). ``worker``: as in ``collect``.
    """
    config, store = context.config, context.evaluations
    if not config.dagger.evaluates(round_index):
        return
    heldout = list(itertools.islice(context.heldout_tasks, config.dagger.evaluation_tasks))
    trained = list(itertools.islice(context.train_tasks, config.dagger.evaluation_train_tasks))

    def turn_policy(student: Policy | None, key: EpisodeKey) -> TurnPolicy:
        assert student is not None  # every round that is evaluated has weights
        return evaluation_policy(context, student)

    def summary(manifest: Manifest) -> dict[str, Any]:
        episodes, abandoned = list(store.episodes(round_index)), store.abandoned(round_index).tasks()

        def success_on(tasks: list[str]) -> dict[str, Any]:
            chosen = [episode for episode in episodes if episode.task_id in set(tasks)]
            return success(chosen, given_up=len(abandoned.intersection(tasks)))

        return {
            "heldout": success_on(heldout),
            "train": success_on(trained) if trained else None,
            "drift": drift_summary(context, round_index, heldout),
        }

    stage = Stage(
        name="evaluate",
        round_index=round_index,
        store=store,
        tasks=heldout + trained,
        weight_version=round_index,
        sampling=config.evaluation_sampling,
        beta=0.0,
        turn_policy=turn_policy,
        summary=summary,
        then=lambda tasks: diagnosis_stages(context, round_index, [task for task in tasks if task in heldout]),
    )
    await run_stage(context, stage, worker)
