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


STAGE = """\
import os, pathlib, signal, sys, time
stage = sys.argv[1]
if stage == "create" or os.environ.get("SLURM_PROCID") != "0":
    sys.exit(0)
log = pathlib.Path(f"{stage}.log")
attempt = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    print(os.environ.get("MASTER_ADDR"), file=file)
if pathlib.Path("wait").exists():
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
    time.sleep(60)
sys.exit({"rollout": [75, 1, 75, 75, 0], "train": [75, 1, 1]}[stage][attempt])
"""


@pytest.mark.skipif(why_unavailable(accounting=True) is not None, reason=str(why_unavailable(accounting=True)))
def test_only_failures_use_up_the_retries(cluster, tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    stage = program(sys.executable, str(tmp_path / "stage.py"))
    two_nodes = ["config.training.parallel.nodes=2", "config.training.parallel.world_size=4"]
    retries = "run.executor.retries=1"
    output = launch(tmp_path, cluster.environment, *SLURM, stage, retries, *two_nodes, expected=1)
    assert "round0-train (FAILED)" in output
    assert (tmp_path / "rollout.log").read_text().splitlines() == ["None"] * 5
    assert (tmp_path / "train.log").read_text().splitlines() == ["n1"] * 3

    (tmp_path / "wait").touch()
    (tmp_path / "rollout.log").unlink()
    (file,) = tmp_path.glob("nemo/experiments/*/*/round0-rollout_sbatch.sh")
    job = cluster.submit(str(file))
    cluster.wait((tmp_path / "rollout.log").exists, 60, "the job to run", lambda: cluster.log(job))
    cluster.call("scancel", job)
    cluster.wait_for(job, "CANCELLED", deadline_s=30)
    assert cluster.job(job)["Restarts"] == "0"
