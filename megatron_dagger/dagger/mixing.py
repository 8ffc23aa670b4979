"""Choose who acts in each turn, and label every visited state with the teacher's action.

A turn belongs to the student or to the teacher as a whole. Where the teacher acts, its executed action is also
the label: one request, not two. The random draws depend only on the episode's key. A state for which the teacher
has no action gets no label; the student, if there is one, acts there.

With ``dagger.takeover_turns`` the teacher also takes over after each turn in which the student did something else than
it would have done, and shows the way back. So a student's errors are executed, but do not pile up to states that no
good student will see (compare HG-DAgger, arXiv 1810.02890, where a person decides when to take over). An error is any
other action, so this is for teachers like the experts of ``envs/``, not for language models, which answer in many ways.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron_dagger.config import DaggerConfig
from megatron_dagger.policies.base import NoAction, Policy
from megatron_dagger.rollout.episode import EpisodeKey, TurnDecision
from megatron_dagger.types import ActedBy, Action, State

logger = logging.getLogger(__name__)

TeacherActs = Callable[[int], bool]  # turn -> whether the teacher acts


@dataclass(kw_only=True)
class MixtureTurnPolicy:
    """Who acts in an episode: the teacher where ``teacher_acts`` says so, else the student; the teacher labels all.

    The teacher acts in the ``takeover_turns`` turns after an error of the student as well. ``student`` is None in
    round 0, where the teacher acts in every turn and its NoAction ends the episode.
    """

    student: Policy | None
    teacher: Policy
    teacher_acts: TeacherActs
    takeover_turns: int = 0
    _takeover_end: int = field(default=0, init=False)  # the teacher acts in the turns before

    async def decide(self, state: State, turn: int) -> TurnDecision:
        if self.student is None:
            action = await self.teacher.act(state)
            return TurnDecision(acted_by=ActedBy.TEACHER, action=action, label=action)
        if turn >= self._takeover_end and not self.teacher_acts(turn):
            action, label = await asyncio.gather(self.student.act(state), self._label(state))
            if label is not None and not action.equals(label):
                self._takeover_end = turn + 1 + self.takeover_turns
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
    """One policy acts in every turn and nothing is labelled, as in an evaluation."""

    policy: Policy
    acted_by: ActedBy = ActedBy.STUDENT

    async def decide(self, state: State, turn: int) -> TurnDecision:
        return TurnDecision(acted_by=self.acted_by, action=await self.policy.act(state), label=None)


def per_turn(beta: float, key: EpisodeKey) -> TeacherActs:
    """Let the teacher act in each turn independently with probability ``beta``."""
    return lambda turn: random.Random(key.seed(turn, "mixing")).random() < beta


def student_prefix(longest: int, key: EpisodeKey) -> TeacherActs:
    """Let the student act in the turns before k, drawn from Uniform{0..longest}, and the teacher from k on."""
    switch = random.Random(key.seed(0, "prefix")).randint(0, longest)
    return lambda turn: turn >= switch


def mixture(config: DaggerConfig, beta: float, key: EpisodeKey) -> TeacherActs:
    """Return the configured mixture for one episode of round ``key.round_index``."""
    if key.round_index == 0:
        return lambda turn: True
    if config.mixing == "prefix":
        longest = min(config.prefix_turns_per_round * key.round_index, config.prefix_turns_limit)
        return student_prefix(longest, key)
    return per_turn(beta, key)
