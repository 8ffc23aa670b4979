"""Wilson's interval against published values."""

import pytest

from megatron_dagger.evaluation.success import success, wilson_interval


def test_wilson_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_no_episodes():
    assert success([])["success"] == 0.0
