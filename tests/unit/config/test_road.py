"""A run has one environment."""

import pytest

from megatron_dagger.config import ConfigError, RoadConfig, RunConfig, SweConfig, TeacherConfig, override


def test_roads_and_swe_tasks_exclude_each_other():
    swe = {
        "swe": SweConfig(train="rows.jsonl", heldout_of_train=10),
        "teacher": TeacherConfig(urls=("http://localhost:1/v1",), model="m"),
        "init_checkpoint": "checkpoints/m",
    }
    RunConfig(**swe)
    with pytest.raises(ConfigError, match=r"road\.stops=3 and tasks\.kind=swe name two environments"):
        RunConfig(**swe, road=RoadConfig(stops=3))


@pytest.mark.parametrize(
    "settings, why",
    [
        (["tasks.kind=swe"], "tasks.kind=swe needs swe.train"),
        (["tasks.kind=road"], "tasks.kind=road needs road.stops"),
        (["tasks.kind=a:b", "road.stops=3"], "road.stops=3 and tasks.kind=a:b name two environments"),
        (["tasks.kind=repair", "road.stops=3"], "name two environments"),
        (["tasks.options.depth=3"], "tasks.options are for environments of your own: repair has settings of its own"),
    ],
)
def test_a_run_has_one_environment(settings, why):
    with pytest.raises(ConfigError, match=why):
        override(RunConfig(), settings)


def test_the_environment_follows_from_the_settings_or_is_named():
    assert RunConfig().environment == "repair"
    assert override(RunConfig(), ["road.stops=3"]).environment == "road"
    assert override(RunConfig(), ["tasks.kind=a:b"]).environment == "a:b"


def test_roads_are_not_used_unless_their_length_is_set():
    assert RunConfig().road.stops == 0
    assert override(RunConfig(), ["road.stops=7"]).road == RoadConfig(stops=7)
