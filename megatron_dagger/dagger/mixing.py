"""Who acts in each turn, and the teacher's label for every state that is visited.

A whole turn is the student's or the teacher's, never a part of one. Where the teacher acts, its
executed action is the label: one call, not two. The draws depend only on the episode's key.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dagger.agents.episode import Decision, EpisodeKey
from megatron_dagger.config import DaggerConfig
from megatron_dagger.policies.base import Policy
from megatron_dagger.types import Executor, State

TeacherActs = Callable[[int], bool]  # turn -> whether the teacher acts


@dataclass(frozen=True, kw_only=True)
class MixtureActor:
    """Student and teacher by turns, as ``teacher_acts`` says; the teacher labels every state.

    ``student`` may be None where the teacher acts in every turn (round 0).
    """

    student: Policy | None
    teacher: Policy
    teacher_acts: TeacherActs

    async def decide(self, state: State, turn: int) -> Decision:
        if self.student is None or self.teacher_acts(turn):
            action = await self.teacher.act(state)
            return Decision(executor=Executor.TEACHER, action=action, label=action)
        action, label = await asyncio.gather(self.student.act(state), self.teacher.act(state))
        return Decision(executor=Executor.STUDENT, action=action, label=label)


@dataclass(frozen=True, kw_only=True)
class SoloActor:
    """One policy alone, unlabelled: evaluation."""

    policy: Policy
    executor: Executor = Executor.STUDENT

    async def decide(self, state: State, turn: int) -> Decision:
        return Decision(executor=self.executor, action=await self.policy.act(state), label=None)


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
