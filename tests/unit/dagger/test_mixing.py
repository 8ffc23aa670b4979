"""The choice of who acts: random draws, the student's prefix, and one teacher request per state."""

import asyncio

import numpy as np
import pytest

from megatron_dagger.config import DaggerConfig
from megatron_dagger.dagger.mixing import MixtureTurnPolicy, SoloTurnPolicy, mixture, per_turn, student_prefix
from megatron_dagger.policies.base import NoAction
from megatron_dagger.rollout.episode import EpisodeKey
from megatron_dagger.types import ActedBy, Message, State
from tools.support.scripted_policies import ReplayPolicy


def key(task="t", round_index=1):
    return EpisodeKey(run_seed=7, round_index=round_index, task_id=task)


def encode(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class Counting:
    """A policy that counts how often it was asked."""

    def __init__(self, text):
        self.policy, self.calls, self.name = ReplayPolicy([text] * 99, encode), 0, text

    async def act(self, state):
        self.calls += 1
        return await self.policy.act(state)


def state():
    return State(messages=(Message(role="user", content="go"),), tokens=encode("go"), seed=1)


def test_the_teachers_share_of_turns_is_beta():
    drawn = [per_turn(0.3, key(f"task-{n}"))(turn) for n in range(200) for turn in range(20)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)


def test_draws_repeat_and_differ_between_episodes():
    first = [per_turn(0.5, key("a"))(turn) for turn in range(64)]
    assert first == [per_turn(0.5, key("a"))(turn) for turn in range(64)]
    assert first != [per_turn(0.5, key("b"))(turn) for turn in range(64)]


@pytest.mark.parametrize(("share", "acts"), [(0.0, False), (1.0, True)])
def test_at_beta_zero_or_one_a_single_policy_acts(share, acts):
    assert all(per_turn(share, key())(turn) is acts for turn in range(50))


def test_the_prefix_belongs_to_the_student_and_has_every_length():
    lengths = set()
    for number in range(400):
        acts = student_prefix(6, key(f"task-{number}"))
        turns = [acts(turn) for turn in range(10)]
        assert turns == sorted(turns), "once the teacher acts, it acts until the end"
        lengths.add(turns.index(True))
    assert lengths == set(range(7))


def test_the_teacher_acts_alone_in_round_zero():
    for mixing in ("per_turn", "prefix"):
        acts = mixture(DaggerConfig(mixing=mixing), 0.0, key(round_index=0))
        assert all(acts(turn) for turn in range(40))


def test_the_teacher_takes_over_after_an_error():
    def acting(student_text, takeover_turns, turns=8):
        student, teacher = Counting(student_text), Counting("t")
        actor = MixtureTurnPolicy(
            student=student, teacher=teacher, teacher_acts=lambda turn: turn == 0, takeover_turns=takeover_turns
        )
        decisions = [asyncio.run(actor.decide(state(), turn)) for turn in range(turns)]
        assert all(decision.label.text == "t" for decision in decisions)
        return "".join(decision.acted_by[0] for decision in decisions)

    assert acting("s", 0) == "tsssssss"
    assert acting("s", 2) == "tsttstts"
    assert acting("t", 2) == "tsssssss", "no error, no takeover"


def test_the_teacher_labels_every_state_with_one_request():
    student, teacher = Counting("s"), Counting("t")
    actor = MixtureTurnPolicy(student=student, teacher=teacher, teacher_acts=lambda turn: turn % 2 == 0)
    by_teacher = asyncio.run(actor.decide(state(), 0))
    assert (by_teacher.acted_by, by_teacher.label) == (ActedBy.TEACHER, by_teacher.action)
    assert (student.calls, teacher.calls) == (0, 1)
    by_student = asyncio.run(actor.decide(state(), 1))
    assert by_student.acted_by is ActedBy.STUDENT
    assert (by_student.action.text, by_student.label.text) == ("s", "t")
    assert (student.calls, teacher.calls) == (1, 2)


class Speechless:
    """A teacher that has no action."""

    name = "speechless"

    async def act(self, state):
        raise NoAction("the conversation is too long")


def test_the_student_acts_without_a_label_and_round_zero_raises():
    actor = MixtureTurnPolicy(student=Counting("s"), teacher=Speechless(), teacher_acts=lambda turn: turn == 0)
    for turn in (0, 1):
        decision = asyncio.run(actor.decide(state(), turn))
        assert (decision.acted_by, decision.action.text, decision.label) == (ActedBy.STUDENT, "s", None)
    alone = MixtureTurnPolicy(student=None, teacher=Speechless(), teacher_acts=lambda turn: True)
    with pytest.raises(NoAction):
        asyncio.run(alone.decide(state(), 0))


def test_a_solo_policy_asks_no_teacher():
    decision = asyncio.run(SoloTurnPolicy(policy=Counting("s")).decide(state(), 0))
    assert decision.label is None
