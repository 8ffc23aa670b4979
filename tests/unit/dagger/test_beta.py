"""Beta schedules against values computed by hand."""

import math

import pytest

from megatron_dagger.config import BetaConfig
from megatron_dagger.dagger.beta import beta


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BetaConfig(schedule="linear", start=1.0, decay=0.2, floor=0.6), [1, 1, 0.8, 0.6, 0.6]),  # the paper's
        (BetaConfig(schedule="linear", start=1.0, decay=0.25), [1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (BetaConfig(schedule="exponential", start=0.8, decay=0.5), [1, 0.8, 0.4, 0.2, 0.1]),
        (BetaConfig(schedule="step", start=1.0, decay=0.5, step_rounds=2), [1, 1, 1, 0.5, 0.5, 0, 0]),
        (BetaConfig(schedule="constant", start=0.3), [1, 0.3, 0.3, 0.3]),
        (BetaConfig(schedule="linear", start=1.0, decay=0.5, warmup_rounds=2), [1, 1, 1, 1, 0.5, 0]),
        (
            BetaConfig(schedule="cosine", start=1.0, horizon_rounds=2, floor=0.2),
            [1, 1, 0.2 + 0.4 * (1 + math.cos(math.pi / 2)), 0.2, 0.2],
        ),
    ],
)
def test_schedule(config, expected):
    assert [beta(config, index) for index in range(len(expected))] == pytest.approx(expected)
