"""Settings are checked on construction and unchanged after a round trip through their file; errors name them."""

import re

import pytest

from megatron_dagger.config import (
    ConfigError,
    ModelConfig,
    ParallelConfig,
    RepoRepairConfig,
    RunConfig,
    TrainingConfig,
    build,
    current_name,
    dump_yaml,
    load_yaml,
    override,
    to_dict,
)
from megatron_dagger.recipes import RECIPES, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_unchanged_after_a_round_trip_through_its_file(name, tmp_path):
    config = find_recipe(name)()
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(RunConfig, tmp_path / "config.yaml") == config
    assert build(RunConfig, to_dict(config)) == config


def test_override_changes_one_setting():
    config = find_recipe("quickstart")()
    changed = override(config, ["training.optimizer.lr=3e-6", "repo_repair.train_packages=[toolz]"])
    assert changed.training.optimizer.lr == 3e-6
    assert changed.repo_repair.train_packages == ("toolz",)
    assert changed.model == config.model


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainin.epochs=1", "did you mean training"),
        ("training.epoch=1", r"did you mean training\.epochs"),
        ("dagger.round=2", r"did you mean dagger\.rounds"),
        ("lr=1e-3", r"did you mean training\.optimizer\.lr"),
        ("max_tokens=3", r"rollout\.sampling\.max_tokens or rollout\.limits\.max_tokens"),
        ("training.epochs=many", "expected a number"),
        ("training.precision=fp7", "choose one of fp32, bf16"),
        ("dagger.rounds=[", r"dagger\.rounds='\[': not a YAML value"),
        ("dagger.rounds=true", "expected int"),
        ("training.optimizer", "NAME=VALUE"),
        ("training=3", "expected a mapping"),
        ("training.epochs.x=3", "not a group"),
    ],
)
def test_wrong_settings_are_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(find_recipe("quickstart")(), [assignment])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        find_recipe("quickstrat")


def test_tensor_parallel_size_must_divide_the_heads():
    parallel = ParallelConfig(world_size=3, tensor_model_parallel_size=3)
    with pytest.raises(ConfigError, match=r"tensor_model_parallel_size=3 does not divide model.num_attention_heads=4"):
        parallel.check_model(ModelConfig(num_attention_heads=4))


def test_batch_must_fill_the_data_parallel_ranks():
    with pytest.raises(ConfigError, match="global_batch_tokens"):
        TrainingConfig(parallel=ParallelConfig(world_size=4), sequence_length=2048, global_batch_tokens=4096)


def test_a_package_for_both_training_and_heldout_tasks_is_refused():
    with pytest.raises(ConfigError, match="toolz"):
        RepoRepairConfig(train_packages=("toolz",), heldout_packages=("toolz", "roman"))


def test_defaults_fit_together():
    assert RunConfig().rollout.limits.max_tokens <= RunConfig().training.sequence_length


def test_settings_of_old_runs_and_scripts_keep_their_names():
    config = override(RunConfig(), ["tasks.train_tasks=7", "swe.admission=report.json"])
    assert (config.repo_repair.train_tasks, config.swe.validation) == (7, "report.json")
    values = to_dict(config)
    values["tasks"] = values.pop("repo_repair")
    values["swe"]["admission"] = values["swe"].pop("validation")
    assert build(RunConfig, values) == config
    assert (
        current_name(RunConfig, "tasks.repeats")
        == current_name(RunConfig, "repo_repair.repeats")
        == "repo_repair.repeats"
    )


def test_a_list_of_one_needs_no_brackets():
    assert override(RunConfig(), ["repo_repair.train_packages=toolz"]).repo_repair.train_packages == ("toolz",)
    with pytest.raises(ConfigError, match="expected a list"):
        override(RunConfig(), ["repo_repair.train_packages=null"])


@pytest.mark.parametrize("text", ["name: [", "\x00", "- 1\n- 2", "nmae: x"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_yaml(RunConfig, path)
