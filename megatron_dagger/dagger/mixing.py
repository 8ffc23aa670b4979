"""Who acts in each turn, and the teacher's label for every state that is visited.

A whole turn is the student's or the teacher's, never a part of one. Where the teacher acts, its
executed action is the label: one call, not two. The draws depend only on the episode's key. A state for
which the teacher has no action stays without a label; the student acts there, if there is one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dagger.config import DaggerConfig
from megatron_dagger.policies.base import NoAction, Policy
from megatron_dagger.rollout.episode import EpisodeKey, TurnDecision
from megatron_dagger.types import ActedBy, Action, State

logger = logging.getLogger(__name__)

TeacherActs = Callable[[int], bool]  # turn -> whether the teacher acts


@dataclass(frozen=True, kw_only=True)
class MixtureTurnPolicy:
    """Student and teacher by turns, as ``teacher_acts`` says; the teacher labels every state.

    ``student`` may be None where the teacher acts in every turn (round 0); then NoAction is raised on.
    """

    student: Policy | None
    teacher: Policy
    teacher_acts: TeacherActs

    async def decide(self, state: State, turn: int) -> TurnDecision:
        if self.student is None:
            action = await self.teacher.act(state)
            return TurnDecision(acted_by=ActedBy.TEACHER, action=action, label=action)
        if not self.teacher_acts(turn):
            action, label = await asyncio.gather(self.student.act(state), self._label(state))
            return TurnDecision(acted_by=ActedBy.STUDENT, action=action, label=label)
        label = await self._label(state)
        if label is None:
            return TurnDecision(acted_by=ActedBy.STUDENT, action=await self.student.act(state), label=None)
        return TurnDecision(acted_by=ActedBy.TEACHER, action=label, label=label)

    async def _label(self, state: State) -> Action | None:
        try:
            return await self.teacher.act(state)
        except NoAction as error:
            logger.warning("a state has no label: %s", error)
            return None


@dataclass(frozen=True, kw_only=True)
class SoloTurnPolicy:
    """One policy alone, unlabelled: evaluation."""

    policy: Policy
    acted_by: ActedBy = ActedBy.STUDENT

    async def decide(self, state: State, turn: int) -> TurnDecision:
        return TurnDecision(acted_by=self.acted_by, action=await self.policy.act(state), label=None)


def per_turn(beta: float, key: EpisodeKey) -> TeacherActs:
    """b_t ~ Bernoulli(beta), drawn anew each turn."""
    return lambda turn: random.Random(key.seed(turn, "mixing")).random() < beta


def student_prefix(longest: int, key: EpisodeKey) -> TeacherActs:
    """k ~ Uniform{0..longest}: the student acts in turns before k, the teacher from there on."""
    switch = random.Random(key.seed(0, "prefix")).randint(0, longest)
    return lambda turn: turn >= switch


def mixture(config: DaggerConfig, beta: float, key: EpisodeKey) -> TeacherActs:
    """The configured mixture for one episode of round ``key.round_index``."""
    if key.round_index == 0:
        return lambda turn: True
    if config.mixing == "prefix":
        longest = min(config.prefix_turns_per_round * key.round_index, config.prefix_turns_limit)
        return student_prefix(longest, key)
    return per_turn(beta, key)
