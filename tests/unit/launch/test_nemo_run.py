"""Our rounds under the real NeMo-Run, in the launch environment: dry runs, golden job files, exit codes.

To update the golden files after an intended change:

NEMORUN_HOME=/tmp/nemo .venv-launch/bin/python tests/unit/launch/driver.py golden tests/unit/launch/golden
"""

import json
from pathlib import Path

import pytest

from megatron_dagger.config import RunConfig, build, load_yaml, override
from megatron_dagger.recipes import RECIPES, find_recipe
from tests.support.launch_environment import PYTHON, ROOT, SKIP_REASON, run_python

GOLDEN = Path(__file__).parent / "golden"

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason=SKIP_REASON),
    pytest.mark.slow,
]


def driver(folder, action, expected=0):
    return run_python(folder, ROOT / "tests" / "unit" / "launch" / "driver.py", action, folder, expected=expected)


def test_the_job_files_equal_the_golden_files(tmp_path):
    driver(tmp_path, "golden")
    for path in GOLDEN.iterdir():
        assert (tmp_path / path.name).read_text() == path.read_text(), path.name


@pytest.fixture(scope="module")
def tasks_of_recipes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dryrun")
    driver(folder, "dryrun")
    return json.loads((folder / "tasks.json").read_text())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_chain_of_jobs(tasks_of_recipes, name):
    config, tasks = find_recipe(name)(), tasks_of_recipes[name]
    stages = [f"round{index}-{stage}" for index in range(config.dagger.rounds + 1) for stage in ("rollout", "train")]
    assert set(stages) <= {task["name"] for task in tasks}
    assert [task["after"] for task in tasks] == [[], *([task["name"]] for task in tasks[:-1])]
    for task in tasks:
        nodes = config.training.parallel.nodes if task["name"].endswith("train") else 1
        assert task["nodes"] == nodes
        assert f"#SBATCH --nodes={nodes}\n" in task["sbatch"]
        assert "#SBATCH --kill-on-invalid-dep=yes\n" in task["sbatch"]
        assert ("export MASTER_ADDR" in task["sbatch"]) == (nodes > 1)
        assert ("--dependency=afterok:" in task["sbatch"]) == (task is not tasks[0])


def test_the_first_job_carries_all_settings(tasks_of_recipes, tmp_path):
    script = tasks_of_recipes["qwen3_4b_swegym_8h100"][0]["script"]
    path = tmp_path / "config.yaml"
    path.write_text(script.partition("<<'END_OF_SETTINGS'\n")[2].partition("END_OF_SETTINGS\n")[0])
    assert load_yaml(RunConfig, path) == find_recipe("qwen3_4b_swegym_8h100")()


def test_a_failed_task_ends_the_experiment_with_an_error(tmp_path):
    output = driver(tmp_path, "failure", expected=1)
    assert "second (FAILED)" in output
    assert (tmp_path / "first").exists()
    assert not (tmp_path / "third").exists()


LAUNCH = ("-m", "megatron_dagger.launch")


def test_settings_are_overridden_and_exported_on_the_command_line(tmp_path):
    """The exported file has NeMo-Run's format: values with their targets."""
    changes = ["training.optimizer.lr=1e-5", "dagger.rounds=1", "rollout.engine.kv_cache_memory_mib=77"]
    settings = ["config=quickstart", "directory=runs/it", *(f"config.{change}" for change in changes)]
    packages = "repo_repair.train_packages=[boltons,munch]"
    run_python(
        tmp_path,
        *LAUNCH,
        "--to-yaml",
        "it.yaml:config",
        *settings,
        "config.repo_repair.train_packages=['boltons','munch']",
    )
    exported = load_plain(tmp_path / "it.yaml")
    assert build(RunConfig, exported) == override(find_recipe("quickstart")(), [*changes, packages])


def load_plain(path):
    import yaml

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key != "_target_"}
        return value

    return plain(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("config=quickstrat", "error: unknown recipe 'quickstrat'; did you mean quickstart?\n"),
        ("run.executor=k8s", "error: run.executor=k8s: there is no such executor; choose one of local, slurm\n"),
        ("config.training.precision=fp9", "fp8_blockwise"),
        ("config.dagger.rounds=-1", "dagger.rounds=-1 must not be negative"),
    ],
)
def test_a_wrong_setting_is_an_error_of_the_command(tmp_path, setting, message):
    settings = (
        ["directory=it", setting] if setting.startswith("config=") else ["config=quickstart", "directory=it", setting]
    )
    output = run_python(tmp_path, *LAUNCH, "--yes", "--dryrun", *settings, expected=1)
    assert message in output


def test_a_missing_run_directory_is_named(tmp_path):
    output = run_python(tmp_path, *LAUNCH, "--yes", "--dryrun", "config=quickstart", expected=1)
    assert output.endswith("error: directory is missing: name the run directory, for example directory=runs/first\n")


def test_a_run_for_several_nodes_is_refused_on_one_machine(tmp_path):
    recipe = "config=qwen3_4b_swegym_4x8h100"
    output = run_python(tmp_path, *LAUNCH, "--yes", "--dryrun", recipe, "directory=it", expected=1)
    assert "a stage on 4 nodes: LocalExecutor has one" in output


def test_the_nodes_of_a_stage_are_set_on_every_type_of_executor(tmp_path):
    driver(tmp_path, "nodes")
    outcomes = json.loads((tmp_path / "nodes.json").read_text())
    refusals = {name: outcomes.pop(name) for name in ("LocalExecutor 4", "SingleExecutor 4")}
    assert outcomes == {
        "SlurmExecutor 1": 1,
        "SlurmExecutor 4": 4,
        "LocalExecutor 1": 1,
        "CloudExecutor 1": 1,
        "CloudExecutor 4": 4,
        "SingleExecutor 1": None,
    }
    for name, message in refusals.items():
        assert message.startswith(f"a stage on 4 nodes: {name.removesuffix(' 4')} has one; use run.executor=slurm")
