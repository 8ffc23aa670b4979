"""Samples and packed rows: every label token once, no attention between trees, always the same rows."""

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from megatron_dagger.training.data.batches import BatchPlan
from megatron_dagger.training.data.packing import pack, padded_length
from megatron_dagger.types import LabelledEpisode, StateLabel

CAPACITY = 48


@st.composite
def episodes(draw: st.DrawFn, longest: int = 40) -> LabelledEpisode:
    tokens = np.array(draw(st.lists(st.integers(0, 9), min_size=1, max_size=longest)), np.int32)
    labels = []
    position = 1
    while position <= len(tokens) and draw(st.booleans()):
        size = draw(st.integers(1, 6))
        own = tokens[position : position + size]
        on_trunk = draw(st.booleans()) and len(own) > 0
        label = own if on_trunk else np.array(draw(st.lists(st.integers(10, 19), min_size=1, max_size=6)))
        weight = draw(st.sampled_from([0.25, 0.5, 1.0, 2.0]))
        labels.append(StateLabel(position=position, tokens=label.astype(np.int32), weight=weight))
        position += size + draw(st.integers(0, 5))
    return LabelledEpisode(tokens=tokens, labels=tuple(labels))


def predictions(data):
    """Return (context, target, weight) of each position with a loss, read from the packed rows alone."""
    result = []
    for index in range(len(data.rows)):
        row = data.row(index)
        for start, stop in zip(row.trees[:-1], row.trees[1:], strict=True):
            for position in np.flatnonzero(row.weights[start:stop]) + start:
                seen = [*range(start, row.prefix_stops[position]), *range(row.run_starts[position], position + 1)]
                assert [int(row.position_ids[i]) for i in seen] == list(range(len(seen)))
                context = tuple(row.tokens[seen])
                result.append((context, int(row.targets[position]), float(row.weights[position])))
    return sorted(result)


def expected(all_episodes):
    result = []
    for episode in all_episodes:
        for label in episode.labels:
            whole = [*episode.tokens[: label.position], *label.tokens]
            for position in range(label.position, len(whole)):
                result.append((tuple(whole[:position]), int(whole[position]), label.weight))
    return sorted(result)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6), st.booleans(), st.sampled_from(["shared_prefix", "separate"]))
def test_every_label_token_is_predicted_once_after_exactly_its_own_context(labelled, one_sample_per_row, packing):
    data = pack(labelled, CAPACITY, packing=packing, one_sample_per_row=one_sample_per_row)
    assert predictions(data) == expected(labelled)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6))
def test_separate_samples_are_plain_segments(labelled):
    data = pack(labelled, CAPACITY, packing="separate")
    for index in range(len(data.rows)):
        row = data.row(index)
        starts = np.repeat(row.trees[:-1], np.diff(row.trees))
        assert np.array_equal(row.run_starts, starts)
        assert np.array_equal(row.prefix_stops, starts)
        assert np.array_equal(row.position_ids, np.arange(CAPACITY) - starts)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(st.lists(episodes(longest=120), max_size=4), st.sampled_from(["shared_prefix", "separate"]))
def test_episodes_of_any_length_are_cut_at_a_turn_never_in_a_label(labelled, packing):
    data = pack(labelled, CAPACITY, packing=packing)
    fitting, dropped, cut = [], 0, 0
    for episode in labelled:
        labels = tuple(label for label in episode.labels if label.position - 1 + len(label.tokens) <= CAPACITY)
        fitting.append(replace(episode, labels=labels))
        dropped += len(episode.labels) - len(labels)
        cut += len(labels) < len(episode.labels)
    assert predictions(data) == expected(fitting)
    assert (data.too_long, data.cut) == (dropped, cut)
    assert data.labels == sum(len(label.tokens) > 0 for episode in fitting for label in episode.labels)
    turns = {at for e in labelled for label in e.labels for at in (label.position, label.position + len(label.tokens))}
    assert {len(sample.trunk) for sample in data.samples} <= turns


def label_shares(labelled, packing, seed):
    """Return each step's label tokens, by their context and target, with their share of the step's loss."""
    data = pack(labelled, CAPACITY, packing=packing)
    plan = BatchPlan(groups=len(data.groups), groups_per_step=2, epochs=2.0, max_steps=None, seed=seed, round_index=0)
    steps = []
    for step in range(plan.steps):
        rows = data.rows_of(plan.groups_of(step))
        own = replace(data, rows=tuple(data.rows[row] for row in rows), groups=())
        total = data.row_weights[rows].sum()
        steps.append([(context, target, weight / total) for context, target, weight in predictions(own)])
    return steps


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(episodes(longest=120), min_size=1, max_size=6), st.integers(0, 9))
def test_a_label_has_the_same_weight_in_the_same_step_with_either_packing(labelled, seed):
    hypothesis.assume(pack(labelled, CAPACITY).rows)
    shared, separate = (label_shares(labelled, packing, seed) for packing in ("shared_prefix", "separate"))
    assert len(shared) == len(separate)
    for ours, theirs in zip(shared, separate, strict=True):
        assert [item[:2] for item in ours] == [item[:2] for item in theirs]
        np.testing.assert_allclose([item[2] for item in ours], [item[2] for item in theirs], rtol=1e-9)


def test_labels_share_their_prefix():
    tokens = np.arange(100, dtype=np.int32)
    labels = tuple(StateLabel(position=p, tokens=np.array([7, 8], np.int32)) for p in range(10, 100, 10))
    episode = LabelledEpisode(tokens=tokens, labels=labels)
    assert pack([episode], 128).tokens == 89 + 9 * 2
    assert pack([episode], 128, packing="separate").tokens == sum(range(11, 101, 10))


def test_branches_that_do_not_fit_go_into_another_row_with_the_trunk():
    tokens = np.arange(40, dtype=np.int32)
    labels = tuple(StateLabel(position=30, tokens=np.full(10, value, np.int32)) for value in (1, 2, 3))
    labelled = [LabelledEpisode(tokens=tokens, labels=labels)]
    data = pack(labelled, CAPACITY)
    assert [len(sample.branches) for sample in data.samples] == [1, 1, 1]
    assert predictions(data) == expected(labelled)


def test_branches_with_the_shortest_prefix_go_into_another_row():
    tokens = np.arange(40, dtype=np.int32)
    branches = [StateLabel(position=p, tokens=np.full(4, p, np.int32)) for p in (5, 20, 12, 36)]
    executed = StateLabel(position=36, tokens=tokens[36:])
    labelled = [LabelledEpisode(tokens=tokens, labels=(*branches, executed))]
    data = pack(labelled, CAPACITY)
    assert [[b.position for b in sample.branches] for sample in data.samples] == [[20, 36], [5, 12]]
    assert [sample.length for sample in data.samples] == [47, 19]
    assert predictions(data) == expected(labelled)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6))
def test_rows_are_well_formed_and_their_sums_agree(labelled):
    data = pack(labelled, CAPACITY)
    assert sorted(i for row in data.rows for i in row) == list(range(len(data.samples)))
    for index, members in enumerate(data.rows):
        row = data.row(index)
        assert row.trees[0] == 0
        assert row.trees[-1] == CAPACITY
        assert (np.diff(row.trees) > 0).all()
        assert np.isclose(row.weights.sum(), data.row_weights[index])
        assert np.count_nonzero(row.weights) == data.row_label_tokens[index]
        assert data.row_tokens[index] == sum(data.samples[i].length for i in members) <= CAPACITY
        assert not row.weights[data.row_tokens[index] :].any()
    if data.rows:
        assert data.bin_fill == pytest.approx(data.row_tokens.sum() / (len(data.rows) * CAPACITY))
        assert data.fill(1) == pytest.approx(1.0)
        assert data.bin_fill <= data.fill(16) <= 1.0


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6))
def test_the_same_episodes_give_the_same_rows(labelled):
    first, second = pack(labelled, CAPACITY), pack(labelled, CAPACITY)
    assert first.rows == second.rows
    for index in range(len(first.rows)):
        assert np.array_equal(first.row(index).tokens, second.row(index).tokens)


def test_agent_episodes_fill_their_rows():
    rng = np.random.default_rng(0)
    labelled = []
    for _ in range(200):
        tokens = rng.integers(0, 9, int(np.clip(rng.lognormal(5.0, 0.7), 40, 1024))).astype(np.int32)
        labelled.append(LabelledEpisode(tokens=tokens, labels=(StateLabel(position=30, tokens=tokens[30:]),)))
    data = pack(labelled, 1024)
    assert data.bin_fill > 0.95
    assert data.fill(16) > 0.98


def test_labels_that_do_not_fit_are_counted_and_the_others_kept(caplog):
    tokens = np.arange(80, dtype=np.int32)
    labels = tuple(StateLabel(position=p, tokens=tokens[p : p + 4]) for p in (10, 45, 46, 70))
    data = pack([LabelledEpisode(tokens=tokens, labels=labels)], CAPACITY)
    assert (data.too_long, data.label_tokens) == (2, 8)
    assert data.samples[0].length == CAPACITY
    assert "too_long: 2 labels" in caplog.text


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6), st.sampled_from([1, 5, 16]))
def test_a_row_is_no_longer_than_its_tokens_and_a_multiple(labelled, multiple):
    data = pack(labelled, CAPACITY)
    for index, tokens in enumerate(data.row_tokens):
        row, whole = data.row(index, padded_length(int(tokens), multiple, CAPACITY)), data.row(index)
        size = len(row.tokens)
        assert (size % multiple == 0 or size == CAPACITY) and tokens <= size < tokens + multiple
        assert row.trees[-1] == size
        assert np.array_equal(row.weights, whole.weights[:size])
        assert np.array_equal(row.prefix_stops[:tokens], whole.prefix_stops[:tokens])
    assert len(data.row(-1, padded_length(0, multiple, CAPACITY)).tokens) == multiple


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(st.lists(episodes(), max_size=6))
def test_attention_pairs_are_counted_as_in_the_rows(labelled):
    data = pack(labelled, CAPACITY)
    for index, tokens in enumerate(data.row_tokens):
        row = data.row(index)
        starts = np.repeat(row.trees[:-1], np.diff(row.trees))
        seen = row.prefix_stops - starts + np.arange(CAPACITY) - row.run_starts + 1
        assert data.row_pairs[index] == seen[:tokens].sum()


def test_padding_is_short_trees():
    tokens = np.arange(20, dtype=np.int32)
    data = pack([LabelledEpisode(tokens=tokens, labels=(StateLabel(position=5, tokens=tokens[5:]),))], 1024)
    assert list(data.row(0).trees) == [0, 19, 275, 531, 787, 1024]


def test_an_empty_row_has_no_loss():
    data = pack([], CAPACITY)
    row = data.row(-1)
    assert (data.fill(16), data.label_tokens, row.weights.sum()) == (0.0, 0, 0.0)
    assert list(row.trees) == [0, CAPACITY]
