"""The learning rate's shape and the plan of batches: pure functions of the step."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dagger.config import OptimizerConfig
from megatron_dagger.training.batches import EMPTY_ROW, BatchPlan
from megatron_dagger.training.schedule import learning_rate


def plan(**changes):
    values = {"rows": 7, "rows_per_step": 4, "epochs": 2.0, "max_steps": None, "seed": 1, "round_index": 0}
    return BatchPlan(**{**values, **changes})


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_rate_rises_to_lr_and_falls_towards_min_lr(decay):
    config = OptimizerConfig(lr=1.0, min_lr=0.1, decay=decay, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    middle = {"constant": 1.0, "linear": 0.55, "cosine": 0.55}[decay]
    assert rates[55] == pytest.approx(middle)
    assert learning_rate(100, 100, config) == pytest.approx(1.0 if decay == "constant" else 0.1)


@given(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["constant", "linear", "cosine"]))
def test_the_rate_is_always_positive_and_at_most_lr(steps, warmup, decay):
    config = OptimizerConfig(lr=2e-3, decay=decay, warmup_steps=warmup)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 2e-3 + 1e-12 for rate in rates)
    assert max(rates) == pytest.approx(2e-3)


@given(st.integers(1, 30), st.integers(1, 9), st.sampled_from([0.3, 1.0, 1.5, 3.0]), st.integers(0, 3))
def test_each_epoch_takes_every_row_once_in_its_own_order(rows, per_step, epochs, seed):
    p = plan(rows=rows, rows_per_step=per_step, epochs=epochs, seed=seed)
    stream = np.concatenate([p.rows_of(step) for step in range(p.steps)])
    wanted = max(1, round(rows * epochs))
    assert (stream[wanted:] == EMPTY_ROW).all()
    assert len(stream) - wanted < per_step
    for start in range(0, wanted, rows):
        epoch = stream[start : min(start + rows, wanted)]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(rows))


def test_ranks_share_a_steps_rows_without_overlap():
    p = plan(rows=40, rows_per_step=8)
    for step in range(p.steps):
        parts = [p.rows_of_rank(step, rank, 4) for rank in range(4)]
        assert sorted(np.concatenate(parts)) == sorted(p.rows_of(step))


def test_the_order_depends_on_seed_round_and_epoch_only():
    base = plan(rows=30, rows_per_step=30)
    assert np.array_equal(base.rows_of(0), plan(rows=30, rows_per_step=30).rows_of(0))
    others = [base.rows_of(1), *(plan(rows=30, rows_per_step=30, **c).rows_of(0) for c in CHANGES)]
    assert all(not np.array_equal(base.rows_of(0), other) for other in others)


CHANGES = ({"seed": 2}, {"round_index": 1})


def test_max_steps_ends_a_round_early():
    assert plan(max_steps=2).steps == 2
    assert plan(max_steps=99).steps == plan().steps == 4
