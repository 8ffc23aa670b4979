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
    with pytest.raises(ConfigError, match=r"swe\.train=rows\.jsonl and road\.stops=3 name two environments"):
        RunConfig(**swe, road=RoadConfig(stops=3))


def test_roads_are_not_used_unless_their_length_is_set():
    assert RunConfig().road.stops == 0
    assert override(RunConfig(), ["road.stops=7"]).road == RoadConfig(stops=7)
