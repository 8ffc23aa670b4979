"""The learning rate's shape and the plan of batches: pure functions of the step."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dagger.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.data.batches import EMPTY_ROW, BatchPlan, row_lengths, share_out
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.training.data.packing import pack
from megatron_dagger.training.schedule import learning_rate
from megatron_dagger.types import LabelledEpisode, StateLabel


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


@given(st.lists(st.floats(1, 9), min_size=12, max_size=12), st.sampled_from([1, 2, 3, 4]), st.integers(0, 5))
def test_ranks_share_a_steps_rows_evenly_by_cost(costs, ranks, empty):
    rows = np.array([*range(12 - empty), *[EMPTY_ROW] * empty])
    costs = np.array(costs)
    shares = share_out(rows, costs, ranks)
    assert sorted(np.concatenate(shares)) == sorted(rows)
    assert {len(share) for share in shares} == {12 // ranks}
    loads = [costs[share[share >= 0]].sum() for share in shares]
    assert max(loads) - min(loads) <= costs.max()
    assert all(np.array_equal(a, b) for a, b in zip(shares, share_out(rows, costs, ranks), strict=True))


def test_the_costliest_rows_are_computed_at_the_same_time():
    shares = share_out(np.arange(4), np.array([1.0, 9.0, 2.0, 8.0]), 2)
    assert [share.tolist() for share in shares] == [[1, 0], [3, 2]]


def test_a_row_is_as_long_as_its_tokens_and_in_a_pipeline_as_the_longest():
    training = TrainingConfig(sequence_length=256, global_batch_tokens=256)
    tokens = np.array([100, 0, 255])
    assert row_lengths(tokens, training) == [112, 16, 256]
    for parallel, expected in (
        ({"tensor_model_parallel_size": 2}, [128, 32, 256]),
        ({"pipeline_model_parallel_size": 2}, [256, 256, 256]),
    ):
        laid_out = replace(training, parallel=ParallelConfig(world_size=2, **parallel))
        assert row_lengths(tokens, laid_out) == expected


def test_attention_counts_in_what_a_row_costs():
    tokens = np.arange(64, dtype=np.int32)
    whole = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=63, tokens=tokens[63:]),))
    half = LabelledEpisode(tokens=tokens[:33], labels=(StateLabel(position=32, tokens=tokens[32:33]),))
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=16, kv_channels=4, num_attention_heads=2)
    one, two = (pack(made, 64) for made in ([whole], [half]))
    (long,), (short,) = row_flops(one, model), row_flops(two, model)
    matrices = 8 * (2 * 8 + 2 * 8 + 3 * 16)
    head = 6 * 8 * model.vocab_size
    assert long == 6 * 63 * matrices + 12 * 8 * (63 * 64 / 2) + head
    assert short == 6 * 32 * matrices + 12 * 8 * (32 * 33 / 2) + head


def test_the_order_depends_on_seed_round_and_epoch_only():
    base = plan(rows=30, rows_per_step=30)
    assert np.array_equal(base.rows_of(0), plan(rows=30, rows_per_step=30).rows_of(0))
    others = [base.rows_of(1), *(plan(rows=30, rows_per_step=30, **c).rows_of(0) for c in CHANGES)]
    assert all(not np.array_equal(base.rows_of(0), other) for other in others)


CHANGES = ({"seed": 2}, {"round_index": 1})


def test_max_steps_ends_a_round_early():
    assert plan(max_steps=2).steps == 2
    assert plan(max_steps=99).steps == plan().steps == 4
