"""The settings: checked on construction, round trip, clear errors."""

import pytest

from megatron_dagger.config import (
    ConfigError,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TasksConfig,
    TrainingConfig,
    build,
    dump_yaml,
    load_yaml,
    override,
    to_dict,
)
from recipes import RECIPES, find_recipe


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_survives_its_file(name, tmp_path):
    config = find_recipe(name)()
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_yaml(RunConfig, tmp_path / "config.yaml") == config
    assert build(RunConfig, to_dict(config)) == config


def test_override_changes_one_setting():
    config = find_recipe("quickstart")()
    changed = override(config, ["training.optimizer.lr=3e-6", "tasks.train_packages=[toolz]"])
    assert changed.training.optimizer.lr == 3e-6
    assert changed.tasks.train_packages == ("toolz",)
    assert changed.model == config.model


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainin.epochs=1", "did you mean training"),
        ("training.epoch=1", "did you mean epochs"),
        ("training.epochs=many", "expected a number"),
        ("training.precision=fp7", "none of"),
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


def test_package_on_both_sides_is_refused():
    with pytest.raises(ConfigError, match="toolz"):
        TasksConfig(train_packages=("toolz",), heldout_packages=("toolz", "roman"))


def test_defaults_fit_together():
    assert RunConfig().rollout.limits.max_tokens <= RunConfig().training.sequence_length
