"""Diagnose an evaluation: does the student leave the teacher's path, and can the teacher find back from there?

After the student's own episodes the teacher plays the same held-out tasks, once alone (once a run, in
``references.zarr``) and once from a state off its path that the student reached (in every evaluated round, in
``takeovers.zarr``). Neither needs the student's engine. ``evaluation.drift`` makes the numbers.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from megatron_dagger.config import LimitsConfig, RunConfig
from megatron_dagger.dagger.aggregation import DEPTH_BUCKET_TURNS
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.dagger.mixing import SoloTurnPolicy
from megatron_dagger.dagger.stage import Stage
from megatron_dagger.evaluation import drift
from megatron_dagger.policies.base import Policy, PolicyError, PolicyGone
from megatron_dagger.rollout.episode import EpisodeKey, TurnDecision, TurnPolicy
from megatron_dagger.types import ActedBy, Action, State, Trajectory

logger = logging.getLogger(__name__)

REFERENCE_ROUND = 0  # of references.zarr: the teacher's episodes are the same in every round


def diagnoses(config: RunConfig) -> bool:
    """Return whether evaluations are diagnosed. Unless it is set, they are if labels are free."""
    wanted = config.dagger.diagnose
    return config.teacher.source == "expert" if wanted is None else wanted


@dataclass(frozen=True, kw_only=True)
class LabelledTurnPolicy:
    """The student acts in every turn and the teacher labels every state, which changes nothing in the episode.

    Only the time that a slow teacher takes counts for the episode's time limit.
    """

    student: Policy
    teacher: Policy

    async def decide(self, state: State, turn: int) -> TurnDecision:
        action, label = await asyncio.gather(self.student.act(state), self._label(state))
        return TurnDecision(acted_by=ActedBy.STUDENT, action=action, label=label)

    async def _label(self, state: State) -> Action | None:
        try:
            return await self.teacher.act(state)
        except PolicyGone:
            raise
        except PolicyError as error:  # the student's episode does not break for want of a label
            logger.warning("a state has no label: %s", error)
            return None


@dataclass(frozen=True, kw_only=True)
class TakeOver:
    """The teacher finishes a student's episode: the turns before ``turn`` are replayed, then the teacher acts."""

    episode: Trajectory
    turn: int

    def turn_policy(self, teacher: Policy) -> TurnPolicy:
        return _TakeOverTurnPolicy(take_over=self, teacher=teacher)

    def limits(self, limits: LimitsConfig) -> LimitsConfig:
        """Return the limits of the whole episode, such that the teacher's part has those of an episode of its own."""
        replayed = self.episode.turns[: self.turn]
        return replace(
            limits,
            max_turns=limits.max_turns + len(replayed),
            max_tokens=limits.max_tokens + sum(len(t.prompt_tokens) + len(t.action.tokens) for t in replayed),
            max_seconds=limits.max_seconds + self.episode.duration_s,
        )


@dataclass(frozen=True, kw_only=True)
class _TakeOverTurnPolicy:
    take_over: TakeOver
    teacher: Policy

    async def decide(self, state: State, turn: int) -> TurnDecision:
        if turn < self.take_over.turn:
            replayed = self.take_over.episode.turns[turn]
            return TurnDecision(acted_by=replayed.acted_by, action=replayed.action, label=replayed.label)
        action = await self.teacher.act(state)
        return TurnDecision(acted_by=ActedBy.TEACHER, action=action, label=action)


def evaluation_policy(context: RunContext, student: Policy) -> TurnPolicy:
    """Return who acts in an evaluation: the student alone. If it is diagnosed, the teacher labels."""
    if diagnoses(context.config):
        return LabelledTurnPolicy(student=student, teacher=context.teacher)
    return SoloTurnPolicy(policy=student)


def choose_take_over(config: RunConfig, episode: Trajectory) -> TakeOver | None:
    """Return the take-over of an evaluated episode, or None if it never left the teacher's path.

    The state is drawn uniformly from the episode's states off the path. The draw depends on the episode's key only.
    """
    states = drift.states_off_path(episode)
    if not states:
        return None
    key = EpisodeKey(run_seed=config.seed, round_index=episode.round_index, task_id=episode.task_id)
    return TakeOver(episode=episode, turn=random.Random(key.seed(0, "take-over")).choice(states))


def diagnosis_stages(context: RunContext, round_index: int, tasks: Sequence[str]) -> list[Stage]:
    """Return the stages that diagnose the round's committed evaluation of the held-out ``tasks``, if any."""
    config, teacher = context.config, context.teacher
    if not diagnoses(config):
        return []
    chosen = {task: choose_take_over(config, e) for task, e in _evaluated(context, round_index, tasks).items()}
    take_overs = {task: take_over for task, take_over in chosen.items() if take_over is not None}
    common = partial(Stage, weight_version=-1, sampling=config.evaluation_sampling, essential=False)
    references = common(
        name="references",
        round_index=REFERENCE_ROUND,
        store=context.references,
        tasks=tasks,
        beta=1.0,
        turn_policy=lambda _, key: SoloTurnPolicy(policy=teacher, acted_by=ActedBy.TEACHER),
    )
    taken_over = common(
        name="takeovers",
        round_index=round_index,
        store=context.takeovers,
        tasks=list(take_overs),
        beta=0.0,
        turn_policy=lambda _, key: take_overs[key.task_id].turn_policy(teacher),
        limits=lambda task: take_overs[task].limits(config.rollout.limits),
    )
    return [references, taken_over]


def drift_summary(context: RunContext, round_index: int, tasks: Sequence[str]) -> dict[str, Any] | None:
    """Return the block ``drift`` of a round's evaluate.json, of the held-out ``tasks``; see ``evaluation.drift``."""
    if not diagnoses(context.config):
        return None
    students = _evaluated(context, round_index, tasks)
    references = {e.task_id: e for e in context.references.episodes(REFERENCE_ROUND) if e.task_id in set(tasks)}
    takeovers = [e for e in context.takeovers.episodes(round_index) if e.task_id in students]
    without_reference = len(context.references.abandoned(REFERENCE_ROUND).tasks().intersection(tasks))
    without_takeover = len(context.takeovers.abandoned(round_index).tasks().intersection(tasks))
    return {
        **drift.errors(students.values(), bucket_turns=DEPTH_BUCKET_TURNS),
        **drift.new_states(students.values(), references),
        "expert_alone": drift.expert_success(list(references.values()), given_up=without_reference),
        "expert_from_student_states": drift.expert_from_student_states(takeovers, students, given_up=without_takeover),
    }


def _evaluated(context: RunContext, round_index: int, tasks: Sequence[str]) -> dict[str, Trajectory]:
    """Return the student's committed episodes of ``tasks``, by task."""
    store = context.evaluations
    keys = sorted(key for key in store.committed(round_index) if key[0] in set(tasks))
    return {key[0]: store.read(round_index, key) for key in keys}
