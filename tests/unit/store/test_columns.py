"""Episodes as columns: encoding, joining and cutting lose nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.store import columns as c
from megatron_dagger.store.codec import decode, encode
from megatron_dagger.store.errors import BrokenEpisodeError, StoreError
from megatron_dagger.types import ActedBy, Action, StopReason, Trajectory, Turn
from tests.support.trajectories import make_trajectory, make_turn, same_trajectory, trajectories


@settings(max_examples=80, deadline=None)
@given(st.lists(trajectories(), max_size=4))
def test_join_cut_and_decode_return_the_same_episodes(episodes: list[Trajectory]) -> None:
    joined = c.join([encode(t) for t in episodes])
    assert c.keys(joined) == [(t.task_id, t.attempt) for t in episodes]
    for index, trajectory in enumerate(episodes):
        assert same_trajectory(decode(joined, index), trajectory)
        assert same_trajectory(decode(c.cut(joined, index), 0), trajectory)
    rejoined = c.join([c.cut(joined, i) for i in range(len(joined))])
    for name in c.LAYOUT:
        assert getattr(rejoined, name).tobytes() == getattr(joined, name).tobytes(), name


def test_the_token_stream_is_the_concatenation_of_prompts_and_actions() -> None:
    trajectory = make_trajectory()
    columns = encode(trajectory)
    stream = np.concatenate([part for t in trajectory.turns for part in (t.prompt_tokens, t.action.tokens)])
    assert columns.tokens.tolist() == stream.tolist()
    assert np.isnan(columns.logprobs).tolist() == [True, True, False, False, True, True, False]
    assert columns.label_tokens.tolist() == [5, 6, 8, 9]  # stored separately, although the first two were executed


@pytest.mark.parametrize("reason", [r for r in StopReason if not r.is_clean])
def test_a_broken_episode_is_refused(reason: StopReason) -> None:
    with pytest.raises(BrokenEpisodeError, match=rf"task-0.*{reason.value}.*not data"):
        encode(make_trajectory(stop_reason=reason))


def test_every_clean_stop_reason_and_every_policy_has_a_code() -> None:
    assert set(c.STOP_REASONS) == {reason for reason in StopReason if reason.is_clean}
    assert set(c.ACTED_BY) == set(ActedBy)


def _turn(tokens: np.ndarray, logprobs: np.ndarray | None = None) -> Turn:
    action = Action(text="", tokens=tokens, logprobs=logprobs)
    return Turn(observation="", prompt_tokens=np.zeros(0, np.int32), acted_by=ActedBy.STUDENT, action=action,
                label=None)  # fmt: skip


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (_turn(np.zeros((2, 2), np.int32)), "1-D array of integers"),
        (_turn(np.array([0.5, 1.0])), "1-D array of integers"),
        (_turn(np.array([2**31])), "fit 32 bits"),
        (_turn(np.array([1, 2], np.int32), np.zeros(3, np.float32)), "2 tokens but log-probs"),
    ],
)
def test_wrong_arrays_are_refused_by_name(turn: Turn, message: str) -> None:
    with pytest.raises(StoreError, match=rf"'bad'.*turn 1: .*{message}"):
        encode(make_trajectory("bad", turns=(make_turn([1]), turn)))


def test_details_must_be_json() -> None:
    with pytest.raises(StoreError, match=r"'task-0'.*details"):
        encode(make_trajectory(details={"x": {1, 2}}))
