"""Settings of an existing run: which can be changed, and the error for a spent budget."""

import asyncio
import os

import pytest

pytest.importorskip("httpx")

from megatron_dagger.cli.main import main
from megatron_dagger.config import to_dict
from megatron_dagger.config.run import BETWEEN_ROUNDS, CHANGEABLE
from megatron_dagger.dagger.context import train_dir, train_manifest
from megatron_dagger.driver.run_dir import CHANGES, load_origin, load_run_config
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.policies.openai.cache import Response, ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.fence import claim
from tests.support.trajectories import make_trajectory

SETTINGS = ["teacher.urls=[http://x/v1]", "teacher.model=m", "teacher.token_budget=5"]


@pytest.fixture
def run(tmp_path):
    assert main(["create", str(tmp_path / "run"), "--recipe", "short_repair", *SETTINGS]) == 0
    return tmp_path / "run"


def test_a_budget_can_be_raised_and_the_original_command_does_not_lower_it(run, capsys):
    assert main(["run", str(run), "teacher.token_budget=50", "--dry-run"]) == 0
    assert "token_budget: 50" in capsys.readouterr().out
    assert load_run_config(run).teacher.token_budget == 5, "a dry run changes nothing"
    assert main(["create", str(run), "teacher.token_budget=50"]) == 0
    assert load_run_config(run).teacher.token_budget == 50
    assert main(["create", str(run), "--recipe", "short_repair", *SETTINGS]) == 0
    assert load_run_config(run).teacher.token_budget == 50


@pytest.mark.parametrize("setting", ["training.epochs=3", "teacher.urls=[]", "teacher.malformed_retries=9"])
def test_settings_that_results_depend_on_cannot_be_changed(run, capsys, setting):
    before = (run / "config.yaml").read_bytes()
    DataStore.create_or_open(run / "data.zarr").append([make_trajectory("task")])
    for argv in (["run", str(run), setting], ["create", str(run), setting]):
        assert main(argv) == 2
        name = setting.partition("=")[0]
        assert f"error: {name}: an existing run's results depend on it" in capsys.readouterr().err
    assert main(["create", str(run), "--recipe", "short_repair", *SETTINGS, setting]) == 2
    assert f"other settings ({name})" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_nothing_is_changed_while_a_process_works_on_the_run(run, capsys):
    with claim(run):
        assert main(["create", str(run), "teacher.token_budget=50"]) != 0
    assert f"{run} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert load_run_config(run).teacher.token_budget == 5


def test_every_changeable_setting_exists(run):
    for name in (*CHANGEABLE, *BETWEEN_ROUNDS):
        node = to_dict(load_run_config(run))
        for part in name.removesuffix(".").split("."):
            node = node[part]
        assert isinstance(node, dict) == name.endswith("."), "a group ends with a dot, a setting does not"


def test_layout_and_memory_of_a_run_with_results_can_be_changed_and_are_recorded(run):
    DataStore.create_or_open(run / "data.zarr").append([make_trajectory("task")])
    layout = ["training.parallel.nodes=2", "training.parallel.tensor_model_parallel_size=1"]
    assert main(["create", str(run), *layout, "rollout.engine.max_num_seqs=8", "training.recompute=full"]) == 0
    parallel = load_run_config(run).training.parallel
    assert (parallel.nodes, parallel.tensor_model_parallel_size, parallel.data_parallel_size) == (2, 1, 2)
    (change,) = read_lines(run / CHANGES)
    assert change["settings"]["training.parallel.nodes"] == {"from": 1, "to": 2}
    assert len(change["settings"]) == 4
    assert main(["create", str(run), *layout]) == 0
    assert len(read_lines(run / CHANGES)) == 1, "nothing changed"


def test_a_layout_that_no_trainer_can_run_is_not_written(run, capsys):
    DataStore.create_or_open(run / "data.zarr").append([make_trajectory("task")])
    before = (run / "config.yaml").read_bytes()
    context_parallel = ["training.parallel.context_parallel_size=2", "training.parallel.world_size=8"]
    assert main(["create", str(run), *context_parallel]) == 2
    assert "context_parallel_size" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_a_job_says_which_nodes_it_has_however_often_it_changes(run):
    DataStore.create_or_open(run / "data.zarr").append([make_trajectory("task")])
    for nodes in (2, 1, 2, 4):
        job = ["create", str(run), "--recipe", "short_repair", *SETTINGS, f"training.parallel.nodes={nodes}"]
        assert main(job) == 0
        assert load_run_config(run).training.parallel.nodes == nodes


def test_precision_and_packing_can_be_changed_between_rounds_only(run, capsys):
    DataStore.create_or_open(run / "data.zarr").append([make_trajectory("task")])
    half_trained = train_dir(run, 1) / "checkpoint-step-000020"
    half_trained.mkdir(parents=True)
    change = ["create", str(run), "training.packing=separate"]
    assert main(change) == 2
    assert "training.packing can be changed between rounds, and round 1 is half trained" in capsys.readouterr().err
    assert load_run_config(run).training.packing == "shared_prefix"
    train_manifest(run, 1).touch()
    assert main(change) == 0
    assert load_run_config(run).training.packing == "separate"


def test_the_error_for_a_spent_budget_suggests_raising_it_not_repeating_the_command(run, capsys, monkeypatch):
    cache = ResponseCache(run / "teacher")
    cache.put("a", Response(text="a", prompt_tokens=9))
    cache.close()

    def ask(arguments):
        with EndpointPool(load_run_config(run).teacher, cache) as pool:
            asyncio.run(pool.request("chat/completions", {}, lambda url, body: body))

    monkeypatch.setattr("megatron_dagger.cli.recipes.main", ask)
    assert main(["recipes"]) == 1
    error = capsys.readouterr().err
    assert "raise it and resume with `megatron-dagger run RUN teacher.token_budget=VALUE`" in error
    assert "the same command" not in error


def test_a_run_without_an_episode_is_replaced_completely(run):
    for name in ("tasks", "student"):
        (run / name).mkdir()
    assert main(["create", str(run), "--recipe", "short_repair", "seed=5"]) == 0
    assert load_run_config(run).seed == 5
    assert not (run / "tasks").exists()
    assert not (run / "student").exists()
    assert load_origin(run).settings == ("seed=5",)
