"""Rounds as NeMo-Run jobs on SLURM: its command line in the launch environment, ours in this one."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger.config import RunConfig, load_yaml
from megatron_dagger.observability.status import status
from megatron_dagger.store.atomic import read_json
from tools.slurm_packages import lacking

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-launch" / "bin" / "python"
SETTINGS = [
    "tasks.source=stdlib",
    "tasks.train_packages=['textwrap','graphlib']",  # the tasks of test_rounds.py, which are made once
    "tasks.heldout_packages=['colorsys']",
    "tasks.train_tasks=8",
    "tasks.heldout_tasks=3",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.vocab_size=600",
    "training.parallel.world_size=2",
    "training.parallel.pipeline_model_parallel_size=1",
    "training.max_steps=2",
    "dagger.rounds=0",
    "dagger.sft_tasks=2",
    "dagger.evaluation_tasks=1",
    "rollout.limits.max_turns=4",
]
SLURM = ["run.executor=slurm", "run.executor.mem=8000", "run.executor.time=00:20:00"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-launch with NeMo-Run: tools/setup makes it"),
]


def launch(folder, environment, *words):
    """The launcher's exit code, and what it printed."""
    command = ["-m", "megatron_dagger.launch", "--yes", "config=quickstart", "directory=run", *words]
    return nemo(folder, environment, *command, *(f"config.{setting}" for setting in SETTINGS))


def nemo(folder, environment, *command):
    """Run the launch environment's Python."""
    variables = {**environment, "PYTHONPATH": str(ROOT), "NEMORUN_HOME": str(folder / "nemo"), "COLUMNS": "200"}
    done = subprocess.run([PYTHON, *command], env=variables, cwd=folder, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


def program(*words):
    return f"program='{' '.join(words)}'"


@pytest.mark.skipif(lacking(accounting=True) is not None, reason=str(lacking(accounting=True)))
def test_a_round_of_jobs_on_slurm_and_one_that_fails(cluster, cache, tmp_path):
    """The whole chain is queued at once; two workers collect, each on its node."""
    ours = program(sys.executable, "-m", "megatron_dagger.cli.main")
    environment = {**cluster.environment, "MEGATRON_DAGGER_CACHE": str(cache)}
    code, output = launch(tmp_path, environment, *SLURM, ours, "workers=2")
    assert code == 0, output[-5000:]
    run = tmp_path / "run"
    assert load_yaml(RunConfig, run / "config.yaml").training.max_steps == 2
    assert read_json(run / "rounds/0000/train/manifest.json")["steps"] == 2
    assert read_json(run / "rounds/0000/evaluate.json")["weight_version"] == 0
    for number in (0, 1):
        assert "1/1 episodes" in (run / f"logs/worker-{number}.log").read_text()
    assert " on n1" in status(run)
    code, output = nemo(tmp_path, environment, PYTHON.with_name("nemo"), "experiment", "status", "quickstart")
    assert (code, output.count("Status: SUCCEEDED")) == (0, 4), output
    code, output = nemo(tmp_path, environment, PYTHON.with_name("nemo"), "experiment", "logs", "quickstart", "0")
    assert code == 0 and "round 0 collect: 1/1 episodes" in output, output

    code, output = launch(tmp_path, environment, *SLURM, program("false"), "run.executor.retries=0")
    assert code == 1, output[-5000:]
    assert "round0-rollout (FAILED)" in output
    assert "round0-train (CANCELLED)" in output
