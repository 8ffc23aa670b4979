"""The learning rate's shape over a round."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from megatron_dagger.config import OptimizerConfig
from megatron_dagger.training.schedule import learning_rate


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


@hypothesis.given(st.integers(1, 50), st.integers(0, 50), st.sampled_from(["constant", "linear", "cosine"]))
def test_the_rate_is_always_positive_and_at_most_lr(steps, warmup, decay):
    config = OptimizerConfig(lr=2e-3, decay=decay, warmup_steps=warmup)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 2e-3 + 1e-12 for rate in rates)
    assert max(rates) == pytest.approx(2e-3)
