"""The teacher's settings: combinations that cannot work are refused."""

import pytest

from megatron_dagger.config import ConfigError, TeacherConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": ("localhost:8000",), "model": "m"}, "is not an http address"),
        ({"urls": ("http://x/v1",)}, r"teacher\.model is missing"),
        ({"urls": ("http://key@x/v1",), "model": "m"}, "must contain no key"),
        ({"money_budget": 5.0}, "needs teacher.price_per_million"),
        ({"score_student_turns": True}, r"teacher\.score_student_turns needs teacher\.urls"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TeacherConfig(**settings)
