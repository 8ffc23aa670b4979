"""Drift, on episodes made by hand: which turns are on the teacher's path, new states, what the expert solves."""

from dataclasses import replace

import pytest

from megatron_dagger.evaluation.drift import (
    errors,
    expert_from_student_states,
    expert_success,
    known_path,
    new_states,
    states_off_path,
    visited_states,
)
from megatron_dagger.types import ActedBy
from tests.support.trajectories import make_trajectory, make_turn

RIGHT, WRONG, UNKNOWN = ([1], [1]), ([2], [1]), ([1], None)


def episode(*turns, task="t", solved=True):
    """An episode of (action, label) or (action, label, observation)."""
    walked = tuple(make_turn(action, label, observation=seen[0] if seen else "ok") for action, label, *seen in turns)
    return make_trajectory(task, turns=walked, solved=solved)


def test_turns_after_the_first_error_are_off_the_path():
    walked = episode(RIGHT, WRONG, RIGHT, WRONG)
    assert list(known_path(walked)) == [(0, True, False), (1, True, True), (2, False, False), (3, False, True)]
    assert states_off_path(walked) == [2, 3]
    assert states_off_path(episode(RIGHT, RIGHT)) == states_off_path(episode(RIGHT, WRONG)) == []


def test_nothing_is_known_from_the_first_unlabelled_turn_on():
    assert list(known_path(episode(RIGHT, UNKNOWN, WRONG))) == [(0, True, False)]
    assert states_off_path(episode(WRONG, RIGHT, UNKNOWN, RIGHT)) == [1]
    assert list(known_path(episode(UNKNOWN))) == []


def test_errors_are_counted_on_and_off_the_path_and_by_depth():
    counted = errors([episode(RIGHT, WRONG, RIGHT, WRONG), episode(RIGHT, RIGHT, RIGHT), episode()], bucket_turns=2)
    assert counted == {
        "on_path": {"turns": 5, "errors": 1, "share": 0.2},
        "off_path": {"turns": 2, "errors": 1, "share": 0.5},
        "by_depth": [[0, 4, 1, 0, 0], [2, 1, 0, 2, 1]],
    }
    nothing = {"turns": 0, "errors": 0, "share": None}
    assert errors([], bucket_turns=4) == {"on_path": nothing, "off_path": nothing, "by_depth": []}


def test_a_state_is_the_last_action_and_the_observation():
    walked = episode(([1], [1], "start"), ([2], [1], "seen"), ([3], None, "seen"))
    assert visited_states(walked) == {(None, "start"), ("say 1", "seen"), ("say 2", "seen")}


def test_new_states_are_those_that_the_teacher_does_not_visit_on_the_same_task():
    teacher = {"t": episode(([1], [1], "start"), ([1], [1], "a"), ([1], [1], "b"))}
    student = episode(([1], [1], "start"), ([2], [1], "a"), ([1], [1], "b"), ([2], [1], "b"), ([1], [1], "b"))
    elsewhere = replace(student, task_id="other")
    counted = new_states([student, elsewhere], teacher)  # new: b after 2, which the student visits twice
    assert counted == {"visited_states": 4, "new_states": 1, "new_states_share": 0.25}
    assert new_states([elsewhere], teacher)["new_states_share"] is None


def test_the_experts_success_counts_abandoned_tasks_as_unsolved():
    values = expert_success([episode(RIGHT), episode(RIGHT, solved=False)], given_up=2)
    assert (values["tried"], values["solved"], values["given_up"], values["success"]) == (4, 1, 2, 0.25)
    assert 0 < values["ci_low"] < 0.25 < values["ci_high"] < 1
    assert expert_success([])["success"] is None


@pytest.mark.parametrize(("seen_again", "exact"), [("b", 1), ("else", 0)])
def test_a_replay_is_exact_if_every_observation_came_again(seen_again, exact):
    student = episode(([2], [1], "a"), ([2], [1], "b"))
    by_teacher = make_turn([1], [1], acted_by=ActedBy.TEACHER, observation=seen_again)
    takeover = replace(student, turns=(student.turns[0], by_teacher, by_teacher))
    assert expert_from_student_states([takeover], {"t": student})["replayed_exactly"] == exact
    ended_early = replace(student, turns=student.turns[:1])
    assert expert_from_student_states([ended_early], {"t": student})["replayed_exactly"] == 0
