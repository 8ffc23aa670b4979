"""The teacher's settings: combinations that cannot work are refused."""

import pytest

from megatron_dagger.config import ConfigError, RunConfig, TeacherConfig, override


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


@pytest.mark.parametrize(
    "settings, source, why",
    [
        ([], "expert", ""),
        (["teacher.urls=[http://h/v1]", "teacher.model=m"], "endpoint", ""),
        (["teacher.kind=a:b", "teacher.options.depth=3"], "a:b", ""),
        (["teacher.kind=endpoint"], "", "teacher.kind=endpoint needs teacher.urls"),
        (["teacher.kind=expert", "teacher.urls=[http://h/v1]", "teacher.model=m"], "", "asks no endpoint"),
        (["teacher.options.depth=3"], "", "teacher.options are for a policy of your own, not for expert"),
        (["teacher.kind=a:b", "teacher.score_student_turns=true"], "", "score_student_turns needs teacher.urls"),
    ],
)
def test_the_teacher_follows_from_the_settings_or_is_named(settings, source, why):
    if why:
        with pytest.raises(ConfigError, match=why):
            override(RunConfig(), settings)
    else:
        assert override(RunConfig(), settings).teacher.source == source
