"""Settings are checked on construction and unchanged after a round trip through their file; errors name them."""

import re

import pytest
import yaml

from megatron_dagger.config import (
    ConfigError,
    EnvironmentConfig,
    ModelConfig,
    ParallelConfig,
    RepoRepairConfig,
    RunConfig,
    TrainingConfig,
    build,
    current_name,
    differing,
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
    config = find_recipe("short_repair")()
    changed = override(config, ["training.optimizer.lr=3e-6", "repo_repair.train_packages=[toolz]"])
    assert changed.training.optimizer.lr == 3e-6
    assert changed.repo_repair.train_packages == ("toolz",)
    assert changed.model == config.model


def test_a_mapping_changes_the_settings_it_names_and_keeps_the_others_of_the_group():
    config = find_recipe("short_repair")()
    changed = override(config, ["dagger={rounds: 9, beta: {start: 0.5}}", "repo_repair={train_tasks: 7}"])
    settings = ["dagger.rounds=9", "dagger.beta.start=0.5", "repo_repair.train_tasks=7"]
    assert changed == override(config, settings)
    assert changed.dagger.tasks_per_round == config.dagger.tasks_per_round


def test_a_group_that_is_null_is_set_by_a_mapping_and_then_by_name():
    changed = override(RunConfig(), ["model.yarn={factor: 2}", "model.yarn.beta_fast=16"])
    assert (changed.model.yarn.factor, changed.model.yarn.beta_fast) == (2, 16)


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
        ("training=3", r"training is a group of settings: set training\.parallel=\.\.\. \(parallel, "),
        ("dagger.beta=0.5", r"dagger\.beta is a group of settings: .* \(schedule, start, floor"),
        ("training.epochs.x=3", r"training\.epochs is a value, not a group of settings"),
        ("init_checkpoint.x=3", "init_checkpoint is a value, not a group of settings"),
        ("model.yarn.factor=2", r"model\.yarn is null: write 'model\.yarn=\{factor: 2\}'"),
        ("dagger={beta: {begin: 1}}", r"unknown setting dagger\.beta\.begin; there are: schedule, start, "),
        ("training.micro_batch_size=1", r"training\.micro_batch_size; there are: parallel, optimizer, "),
        ("training.parallel.tp=1", r"training\.parallel\.tp; there are: world_size, "),
        ("learning_rate=1", "learning_rate; `megatron-dagger run RUN --recipe NAME --dry-run` prints all settings"),
        ("teacher.urls=", r"teacher\.urls: expected a list, got None; for none write teacher\.urls=\[\]"),
    ],
)
def test_wrong_settings_are_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(find_recipe("short_repair")(), [assignment])


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
    config = override(RunConfig(), ["swe.admission=report.json"])
    assert config.swe.validation == "report.json"
    values = to_dict(config)
    values["swe"]["admission"] = values["swe"].pop("validation")
    assert build(RunConfig, values) == config
    assert current_name(RunConfig, "swe.admission") == current_name(RunConfig, "swe.validation") == "swe.validation"


def test_a_mapping_of_options_takes_any_names():
    config = override(
        RunConfig(), ["tasks.kind=a:b", "tasks.options.depth=3", "tasks.options={names: [x], more: {y: 1}}"]
    )
    assert config.tasks == EnvironmentConfig(kind="a:b", options={"depth": 3, "names": ["x"], "more": {"y": 1}})
    changed = override(config, ["tasks.options.depth=4"])
    assert changed.tasks.options == {"depth": 4, "names": ["x"], "more": {"y": 1}}
    assert build(RunConfig, yaml.safe_load(dump_yaml(changed))) == changed
    assert differing(config, changed) == differing(changed, config) == ["tasks.options.depth"]
    assert override(RunConfig(), ["tasks.kind=a:b", "tasks.options.a.b=3"]).tasks.options == {"a": {"b": 3}}
    with pytest.raises(ConfigError, match=r"tasks\.options\.depth is a value, not a group of settings"):
        override(config, ["tasks.options.depth.more=3"])
    with pytest.raises(ConfigError, match=r"tasks\.options: expected a mapping, got 3"):
        override(config, ["tasks.options=3"])
    with pytest.raises(ConfigError, match=r"unknown setting tasks\.option"):
        override(config, ["tasks.option.depth=3"])


def test_a_list_of_one_needs_no_brackets():
    assert override(RunConfig(), ["repo_repair.train_packages=toolz"]).repo_repair.train_packages == ("toolz",)
    with pytest.raises(ConfigError, match="expected a list"):
        override(RunConfig(), ["repo_repair.train_packages=null"])


def test_an_empty_or_missing_file_is_named(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match=re.escape(f"cannot read {path}: No such file")):
        load_yaml(RunConfig, path)
    path.touch()
    with pytest.raises(ConfigError, match=re.escape(f"{path} is empty: not a run's settings")):
        load_yaml(RunConfig, path)


@pytest.mark.parametrize("text", ["name: [", "\x00", "- 1\n- 2", "nmae: x"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_yaml(RunConfig, path)
