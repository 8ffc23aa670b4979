"""The groups of rows of each step: a pure function of seed, round and step, shared evenly among the ranks."""

from dataclasses import replace

import hypothesis
import numpy as np
from hypothesis import strategies as st

from megatron_dagger.config import ParallelConfig, TrainingConfig
from megatron_dagger.training.data.batches import EMPTY_ROW, BatchPlan, distribute_rows, fill_up, row_lengths


def plan(**changes):
    values = {"groups": 7, "groups_per_step": 4, "epochs": 2.0, "max_steps": None, "seed": 1, "round_index": 0}
    return BatchPlan(**{**values, **changes})


@hypothesis.given(st.integers(1, 30), st.integers(1, 9), st.sampled_from([0.3, 1.0, 1.5, 3.0]), st.integers(0, 3))
def test_each_epoch_takes_every_group_once_in_its_own_order(groups, per_step, epochs, seed):
    p = plan(groups=groups, groups_per_step=per_step, epochs=epochs, seed=seed)
    steps = [p.groups_of(step) for step in range(p.steps)]
    assert {len(step) for step in steps[:-1]} <= {per_step}
    assert 0 < len(steps[-1]) <= per_step
    stream = np.concatenate(steps)
    assert len(stream) == max(1, round(groups * epochs))
    for start in range(0, len(stream), groups):
        epoch = stream[start : start + groups]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(groups))


@hypothesis.given(st.integers(0, 40), st.sampled_from([(1, 1, 1), (4, 1, 2), (6, 3, 1), (8, 2, 2)]))
def test_every_rank_gets_equally_many_rows_and_a_virtual_pipeline_whole_rounds(count, layout):
    world_size, pipeline, virtual = layout
    parallel = ParallelConfig(
        world_size=world_size,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if pipeline > 1 else None,
    )
    training = TrainingConfig(parallel=parallel, sequence_length=32, global_batch_tokens=32 * world_size // pipeline)
    rows = fill_up(np.arange(count), training)
    multiple = parallel.data_parallel_size * (pipeline if pipeline > 1 and virtual > 1 else 1)
    assert rows[:count].tolist() == list(range(count)) and (rows[count:] == EMPTY_ROW).all()
    assert len(rows) % multiple == 0 and len(rows) >= multiple
    assert len(rows) - count < multiple or not count


@hypothesis.given(st.lists(st.floats(1, 9), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]), st.integers(0, 5))
def test_ranks_share_a_steps_rows_evenly_by_cost(costs, ranks, empty):
    rows = np.array([*range(12 - empty), *[EMPTY_ROW] * empty])
    costs = np.array(costs)
    shares = distribute_rows(rows, costs, ranks)
    assert sorted(np.concatenate(shares)) == sorted(rows)
    assert {len(share) for share in shares} == {12 // ranks}
    loads = [costs[share[share >= 0]].sum() for share in shares]
    assert max(loads) - min(loads) <= costs.max()
    assert all(np.array_equal(a, b) for a, b in zip(shares, distribute_rows(rows, costs, ranks), strict=True))


def test_the_costliest_rows_are_computed_at_the_same_time():
    shares = distribute_rows(np.arange(4), np.array([1.0, 9.0, 2.0, 8.0]), 2)
    assert [share.tolist() for share in shares] == [[1, 0], [3, 2]]


def test_a_row_is_as_long_as_its_tokens_and_in_a_pipeline_as_the_longest():
    training = TrainingConfig(sequence_length=256, global_batch_tokens=256)
    tokens = np.array([100, 0, 255])
    assert row_lengths(tokens, training) == [112, 16, 256]
    for parallel, expected in (
        ({"tensor_model_parallel_size": 2}, [128, 32, 256]),
        ({"pipeline_model_parallel_size": 2}, [256, 256, 256]),
    ):
        in_layout = replace(training, parallel=ParallelConfig(world_size=2, **parallel))
        assert row_lengths(tokens, in_layout) == expected


def test_the_order_depends_on_seed_round_and_epoch_only():
    base = plan(groups=30, groups_per_step=30)
    assert np.array_equal(base.groups_of(0), plan(groups=30, groups_per_step=30).groups_of(0))
    orders = [base.groups_of(1), *(plan(groups=30, groups_per_step=30, **c).groups_of(0) for c in CHANGES)]
    assert all(not np.array_equal(base.groups_of(0), order) for order in orders)


CHANGES = ({"seed": 2}, {"round_index": 1})


def test_max_steps_ends_a_round_early():
    assert plan(max_steps=2).steps == 2
    assert plan(max_steps=99).steps == plan().steps == 4
