"""Aggregation: which labels a round trains on, and the summary of a collection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.config import AggregationConfig
from megatron_dagger.dagger.aggregation import aggregate, labels_of, select_rounds, summarise
from megatron_dagger.types import ActedBy, LabelledEpisode, StopReason, Trajectory
from tests.support.trajectories import make_trajectory, make_turn

# few token values and short parts: states and labels really coincide
_tokens = st.lists(st.integers(0, 1), max_size=2)
_turns = st.builds(
    lambda action, label, prompt, teacher: make_turn(
        action, label, prompt=tuple(prompt), acted_by=ActedBy.TEACHER if teacher else ActedBy.STUDENT
    ),
    _tokens,
    st.none() | _tokens,
    _tokens,
    st.booleans(),
)


@st.composite
def runs(draw: st.DrawFn) -> list[Trajectory]:
    keys = draw(st.sets(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.integers(0, 1)), max_size=6))
    return [
        make_trajectory(
            task,
            attempt=attempt,
            round_index=index,
            turns=tuple(draw(st.lists(_turns, max_size=4))),
            stop_reason=draw(st.sampled_from([StopReason.SUBMITTED, StopReason.TURN_LIMIT])),
            solved=draw(st.booleans()),
        )
        for index, task, attempt in sorted(keys)
    ]


def naive(trajectories: list[Trajectory], config: AggregationConfig) -> list[tuple[list[int], list[tuple]]]:
    """Return the labels as specified, computed without hashes or incremental positions."""
    seen, result = [], []
    for trajectory in trajectories:
        if config.filter == "finished" and trajectory.stop_reason is not StopReason.SUBMITTED:
            continue
        if config.filter == "solved" and not trajectory.solved:
            continue
        stream, labels = [], []
        for turn in trajectory.turns:
            stream += turn.prompt_tokens.tolist()
            if turn.label is not None and turn.label.tokens.size:
                pair = (tuple(stream), tuple(turn.label.tokens.tolist()))
                if pair not in seen or not config.deduplicate:
                    labels.append((len(stream), pair[1]))
                seen.append(pair)
            stream += turn.action.tokens.tolist()
        if labels:
            result.append((stream, labels))
    return result


def plain(episodes: list[LabelledEpisode]) -> list[tuple[list[int], list[tuple]]]:
    return [(e.tokens.tolist(), [(x.position, tuple(x.tokens.tolist())) for x in e.labels]) for e in episodes]


@settings(max_examples=300, deadline=None)
@given(runs(), st.sampled_from(["none", "finished", "solved"]), st.booleans())
def test_equals_the_specification(trajectories: list[Trajectory], name: str, deduplicate: bool) -> None:
    config = AggregationConfig(filter=name, deduplicate=deduplicate)
    episodes = aggregate(iter(trajectories), config)
    assert plain(episodes) == naive(trajectories, config)
    assert all(e.tokens.dtype == np.int32 and all(x.weight == 1.0 for x in e.labels) for e in episodes)
    if deduplicate:
        pairs = [(e.tokens[: x.position].tobytes(), x.tokens.tobytes()) for e in episodes for x in e.labels]
        assert len(pairs) == len(set(pairs))


def test_label_positions_follow_the_prompt() -> None:
    turns = (make_turn([10, 11], [20], prompt=(1, 2, 3)), make_turn([12], None, prompt=(4,)),
             make_turn([13], [13], prompt=(5, 6)))  # fmt: skip
    tokens, labels = labels_of(make_trajectory(turns=turns))
    assert tokens.tolist() == [1, 2, 3, 10, 11, 4, 12, 5, 6, 13]
    assert [(x.position, x.tokens.tolist()) for x in labels] == [(3, [20]), (9, [13])]
    assert tokens[9:10].tolist() == labels[1].tokens.tolist()  # on the trunk, as it was executed


def test_a_label_that_differs_from_the_action_has_a_weight_of_its_own() -> None:
    taught = make_turn([5], [5], acted_by=ActedBy.TEACHER)
    turns = (make_turn([5], [5]), make_turn([5], [6]), taught, make_turn([5, 5], [5]))
    (episode,) = aggregate([make_trajectory(turns=turns)], AggregationConfig(disagreement_weight=4.0))
    assert [label.weight for label in episode.labels] == [1.0, 4.0, 1.0, 4.0]


def test_labels_after_different_states_are_not_duplicates() -> None:
    first = make_trajectory("a", turns=(make_turn([0], [7, 8], prompt=(1,)),))
    second = make_trajectory("b", turns=(make_turn([0], [8], prompt=(1, 7)),))
    assert len(aggregate([first, second], AggregationConfig())) == 2


def test_the_first_of_equal_labels_is_kept_and_empty_episodes_are_dropped() -> None:
    first = make_trajectory("a", turns=(make_turn([5], [9]), make_turn([6], [8])))
    second = replace(first, task_id="b", turns=(make_turn([5], [9]), make_turn([6], [7])))
    third = replace(first, round_index=1)
    episodes = aggregate([first, second, third], AggregationConfig())
    assert plain(episodes) == [([1, 2, 5, 1, 2, 6], [(2, (9,)), (5, (8,))]), ([1, 2, 5, 1, 2, 6], [(5, (7,))])]
    assert len(aggregate([first, second, third], AggregationConfig(deduplicate=False))) == 3


def test_order_is_required() -> None:
    a, b = make_trajectory("a"), make_trajectory("b")
    for wrong in ([b, a], [a, a]):
        with pytest.raises(ValueError, match=r"comes after .* order"):
            aggregate(wrong, AggregationConfig())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AggregationConfig(window="all"), [0, 1, 3, 4]),
        (AggregationConfig(window="last", last_rounds=2), [3, 4]),
        (AggregationConfig(window="last", last_rounds=3), [3, 4]),
        (AggregationConfig(window="last", last_rounds=50), [0, 1, 3, 4]),
        (AggregationConfig(window="current"), [4]),
    ],
)
def test_windows(config: AggregationConfig, expected: list[int]) -> None:
    assert select_rounds(config, 4, [5, 4, 3, 1, 0]) == expected  # round 2 holds no data, 5 is to come


def test_summary_of_a_collection() -> None:
    teacher = make_turn([5], [5], acted_by=ActedBy.TEACHER)
    agree, differ, unlabelled = make_turn([5], [5]), make_turn([5], [6]), make_turn([5])
    first = make_trajectory("a", turns=(teacher, agree, differ, agree, differ, agree))
    second = make_trajectory("b", turns=(agree, unlabelled), stop_reason=StopReason.TURN_LIMIT, solved=False)
    assert summarise(iter([first, second])) == {
        "episodes": 2,
        "turns": 8,
        "labelled_turns": 7,
        "teacher_turn_share": 1 / 8,
        "agreement": 4 / 6,  # the teacher's own turn and the unlabelled one do not count
        "agreement_by_depth": [[0, 4, 3], [4, 2, 1]],
        "solved": 1,
        "finished": 1,
        "truncated": 1,
        "stop_reasons": {"submitted": 1, "turn_limit": 1},
        "median_turns": 4,
    }


def test_summary_of_nothing_and_of_teacher_episodes() -> None:
    assert summarise([])["median_turns"] is None
    only_teacher = make_trajectory(turns=(make_turn([5], [5], acted_by=ActedBy.TEACHER),))
    summary = summarise([only_teacher])
    assert summary["agreement"] is None
    assert summary["agreement_by_depth"] == []
    assert summary["teacher_turn_share"] == 1.0


@given(runs(), st.integers(1, 5), st.none() | st.integers(1, 5))
@settings(deadline=None)
def test_a_cap_samples_at_most_that_many_labels_of_each_round(trajectories, cap, sft_cap):
    capped = AggregationConfig(max_labels_per_round=cap, max_sft_labels=sft_cap)
    for index in {trajectory.round_index for trajectory in trajectories}:
        of_round = [trajectory for trajectory in trajectories if trajectory.round_index == index]
        every = [label for episode in aggregate(of_round, AggregationConfig()) for label in episode.labels]
        kept = [label for episode in aggregate(of_round, capped) for label in episode.labels]
        names = [(label.position, label.tokens.tolist()) for label in every]
        assert len(kept) == min(cap if index or sft_cap is None else sft_cap, len(every))
        assert all((label.position, label.tokens.tolist()) in names for label in kept)
        repeated = [label for episode in aggregate(of_round, capped) for label in episode.labels]
        assert [k.position for k in repeated] == [k.position for k in kept]
