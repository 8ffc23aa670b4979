"""What is refused before a run is created."""

from dataclasses import replace

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.config import ConfigError, RunConfig, override
from megatron_dagger.driver import checks
from megatron_dagger.driver.checks import check_run
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.recipes import find_recipe
from tools.support.checkpoints import write_index


@pytest.fixture
def config(tmp_path):
    """Return the 8B recipe with a checkpoint of its model and files for its data sets."""
    base = find_recipe("qwen3_8b_swegym_8h100")()
    write_index(tmp_path / "checkpoint", base.model)
    (tmp_path / "rows.jsonl").touch()
    rows = tmp_path / "rows.jsonl"
    return override(base, [f"init_checkpoint={tmp_path / 'checkpoint'}", f"swe.train={rows}", f"swe.heldout={rows}"])


def test_a_recipe_with_its_checkpoint_passes(config):
    check_run(config)


def test_one_process_must_hold_trainer_and_engine(config, monkeypatch):
    monkeypatch.setattr(checks, "has_gpus", lambda environ: True)
    with pytest.raises(ConfigError, match="trainer and engine do not fit h100 GPUs at the same time"):
        check_run(config, here=True)
    check_run(config, here=True, gpu="any")


def test_a_run_that_was_created_for_separate_stages_is_not_run_in_one_process(config, tmp_path, capsys):
    create_run(config, tmp_path / "run")
    assert main(["run", str(tmp_path / "run")]) == 2
    assert "trainer and engine do not fit h100 GPUs at the same time" in capsys.readouterr().err


def test_the_checkpoint_must_be_of_the_model(config):
    with pytest.raises(ConfigError, match=r"is of another model: model\.rotary_base=5000000, not 5"):
        check_run(replace(config, model=replace(config.model, rotary_base=5)))


def test_the_checkpoint_must_be_whole(config, tmp_path):
    (tmp_path / "checkpoint" / "__0_0.distcp").unlink()
    with pytest.raises(ConfigError, match=r"init_checkpoint: .*__0_0\.distcp is missing from the checkpoint"):
        check_run(config)
    write_index(tmp_path / "other", replace(config.model, num_layers=35))
    (tmp_path / "other" / ".metadata").rename(tmp_path / "checkpoint" / ".metadata")
    with pytest.raises(ConfigError, match=r"init_checkpoint: .* lacks 'decoder\.layers\.35"):
        check_run(config)
    (tmp_path / "checkpoint" / ".metadata").unlink()
    with pytest.raises(ConfigError, match="is not a complete Megatron checkpoint"):
        check_run(config)


def test_on_a_machine_without_gpus_fp8_is_refused_here_only(config, monkeypatch):
    monkeypatch.setattr(checks, "has_gpus", lambda environ: False)
    config = override(config, ["training.precision=fp8_tensorwise"])
    with pytest.raises(ConfigError, match="needs a GPU"):
        check_run(config, here=True)
    check_run(config)


@pytest.mark.parametrize("setting", ["repo_repair.train_packages=[nosuch]", "repo_repair.heldout_packages=[nosuch]"])
def test_unknown_packages_are_refused(setting):
    with pytest.raises(ConfigError, match=r"repo_repair\.(train|heldout)_packages: .*nosuch"):
        check_run(override(RunConfig(), [setting]))
