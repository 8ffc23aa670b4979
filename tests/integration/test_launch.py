"""Rounds as NeMo-Run jobs on SLURM: the launcher runs in the launch environment, the jobs in this one."""

import sys

import pytest

from megatron_dagger.config import RunConfig, load_yaml
from megatron_dagger.observability.status import status
from megatron_dagger.store.atomic import read_json
from tests.support.launch_environment import PYTHON, SKIP_REASON, run_python
from tools.virtual_slurm.packages import why_unavailable

SETTINGS = [
    "repo_repair.source=stdlib",
    "repo_repair.train_packages=['textwrap','graphlib']",  # the tasks of test_rounds.py, which are made once
    "repo_repair.heldout_packages=['colorsys']",
    "repo_repair.train_tasks=8",
    "repo_repair.heldout_tasks=3",
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
    pytest.mark.skipif(not PYTHON.exists(), reason=SKIP_REASON),
]


def launch(folder, environment, *arguments, expected=0):
    """Launch a run and return the launcher's output."""
    command = ["-m", "megatron_dagger.launch", "--yes", "config=short_repair", "directory=run", *arguments]
    settings = (f"config.{setting}" for setting in SETTINGS)
    return run_python(folder, *command, *settings, environment=environment, expected=expected, timeout=500)


def program(*arguments):
    return f"program='{' '.join(arguments)}'"


@pytest.mark.skipif(why_unavailable(accounting=True) is not None, reason=str(why_unavailable(accounting=True)))
def test_a_round_of_jobs_on_slurm_and_one_that_fails(cluster, cache, tmp_path):
    """The whole chain is queued at once; two workers collect, each on its node."""
    ours = program(sys.executable, "-m", "megatron_dagger.cli.main")
    environment = {**cluster.environment, "MEGATRON_DAGGER_CACHE": str(cache)}
    launch(tmp_path, environment, *SLURM, ours, "workers=2")
    run = tmp_path / "run"
    assert load_yaml(RunConfig, run / "config.yaml").training.max_steps == 2
    assert read_json(run / "rounds/0000/train/manifest.json")["steps"] == 2
    assert read_json(run / "rounds/0000/evaluate.json")["weight_version"] == 0
    for number in (0, 1):
        assert "1/1 episodes" in (run / f"logs/worker-{number}.log").read_text()
    assert " on n1" in status(run)
    experiment = (PYTHON.with_name("nemo"), "experiment")
    output = run_python(tmp_path, *experiment, "status", "short_repair", environment=environment)
    assert output.count("Status: SUCCEEDED") == 4, output
    assert "round 0 collect: 1/1 episodes" in run_python(
        tmp_path, *experiment, "logs", "short_repair", "0", environment=environment
    )

    output = launch(tmp_path, environment, *SLURM, program("false"), "run.executor.retries=0", expected=1)
    assert "round0-rollout (FAILED)" in output
    assert "round0-train (CANCELLED)" in output
