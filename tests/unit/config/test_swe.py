"""The settings that a run on SWE tasks requires."""

import pytest

from megatron_dagger.config import ConfigError, RunConfig, SweConfig, TeacherConfig


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": TeacherConfig()}, r"swe\.train needs teacher\.urls"),
        ({"init_checkpoint": None}, r"swe\.train needs init_checkpoint"),
    ],
)
def test_missing_settings_of_swe_tasks_are_errors(changed, message):
    needed = {
        "swe": SweConfig(train="rows.jsonl", heldout_of_train=10),
        "teacher": TeacherConfig(urls=("http://localhost:1/v1",), model="m"),
        "init_checkpoint": "checkpoints/m",
    }
    RunConfig(**needed)
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{**needed, **changed})


def test_evaluation_tasks_must_be_named():
    with pytest.raises(ConfigError, match=r"swe\.heldout is missing"):
        SweConfig(train="rows.jsonl")
