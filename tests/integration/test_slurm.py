"""Whole runs with the sbatch files on a real SLURM of two nodes, disturbed as clusters disturb jobs.

Each run suffers many faults, one after another, because starting an engine takes most of the time. It must end with the
data, losses and weights of the undisturbed run.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_dagger.observability.status import status
from megatron_dagger.store.lock import LockedError, flocked
from tests.integration.slurm_runs import ROOT, Run
from tests.integration.tiny_run import assert_same
from tools.virtual_slurm.packages import why_unavailable
from tools.virtual_slurm.settings import WAIT_S

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.usefixtures("clean_cluster")]
BATCH = ("--gpus-per-node=4", "--mem=8000")

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)


def stop_between_writes(pid, run):
    """Stop a driver by SIGSTOP while it does not hold the run's fence, since another driver needs the fence."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(LockedError), flocked(run / ".fence", deadline_s=0.2):
            return
        os.kill(pid, signal.SIGCONT)


def test_a_cluster_ends_when_its_owner_is_killed():
    code = (
        "import os, signal; from tools.virtual_slurm.cluster import SlurmCluster\n"
        "cluster = SlurmCluster().__enter__()\n"
        "job = cluster.submit('--wrap=setsid sleep 1000', '--mem=10', '--output=/dev/null')\n"
        "cluster.wait_for(job, 'RUNNING', deadline_s=20)\n"
        "print(cluster.folder, len(cluster.processes()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    folder, processes = done.stdout.split()
    assert int(processes) > 5
    deadline = time.monotonic() + 20
    while Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not subprocess.run(["pgrep", "-f", folder], capture_output=True, check=False).stdout


def test_a_terminated_benchmark_cleans_up(batch_environment, undisturbed):
    with tempfile.TemporaryDirectory() as folder:  # a short path, since it will hold munge's socket
        bench = subprocess.Popen(
            [sys.executable, "-m", "tools.bench.slurm"], cwd=ROOT, env={**batch_environment, "TMPDIR": folder}
        )
        try:
            deadline = time.monotonic() + 60
            while not list(Path(folder).glob("slurm-*/slurm.conf")):
                assert bench.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            bench.terminate()
            bench.wait(60)
            assert not list(Path(folder).iterdir())
        finally:
            bench.kill()


def test_a_single_node_run_survives_cancel_kill_preemption_and_a_lost_node(
    cluster, batch_environment, undisturbed, tmp_path
):
    run = Run(cluster, tmp_path, batch_environment, "slurm/single_node.sbatch", "dagger.evaluate_rounds=last")
    submit = functools.partial(run.submit, *BATCH)

    submit()
    run.wait_for_file("status/0000-collect.json")
    run.cancel()
    assert not (run.path / "rounds/0000/collect.json").exists(), "cancelled during the collection"

    # The node is lost while the driver is stopped. SLURM restarts the job on the other node, then the old driver wakes.
    submit()
    run.wait_for_file("status/0000-collect.json")
    run.wait(lambda: len(run.drivers()) == 1, "the driver")
    (old_driver,) = run.drivers()
    run.wait(lambda: f'"pid": {old_driver}' in (run.path / "status/0000-collect.json").read_text(), "its collection")
    stop_between_writes(old_driver, run.path)
    lost = cluster.job(run.job)["NodeList"]
    cluster.kill_node(lost)
    run.wait_for_restart(1)
    assert cluster.job(run.job)["NodeList"] != lost
    run.wait(lambda: '"restart": 1' in (run.path / ".fence").read_text(), "the new driver")
    assert old_driver in cluster.job_processes(run.job)
    os.kill(old_driver, signal.SIGCONT)
    run.wait(lambda: old_driver not in cluster.job_processes(run.job), "the old driver to end")
    assert "has taken this run over" in (run.path / "logs/driver.log").read_text() + run.log.read_text()
    cluster.start_node(lost)
    run.wait_for_steps(1)
    run.cancel()
    assert not (run.path / "rounds/0000/train/manifest.json").exists(), "cancelled during the training"

    submit()
    run.wait_for_steps(run.steps() + 1)
    os.kill(run.rank(1), signal.SIGKILL)
    run.wait_for_end("FAILED")
    assert "rank 1 failed: was killed by SIGKILL" in run.log.read_text()
    text = status(run.path)
    assert "train     failed" in text
    assert f"in round 0 train: {run.steps()} steps" in text
    assert f"(job {run.job} on n" in text
    assert f"Its log: {run.path}/logs/train-0000" in text

    submit()
    run.wait_for_steps(run.steps() + 1)
    run.preempt()
    assert list(run.path.glob("rounds/0000/train/checkpoint-step-*/complete.json"))
    run.wait_for_restart(1)
    run.wait_for_file("status/0001-collect.json")
    assert "resuming after step" in (run.path / "logs/train-0000/rank-0.log").read_text()
    (engine,) = run.drivers()
    os.kill(engine, signal.SIGKILL)
    run.wait_for_end("FAILED")
    assert "Killed" in run.log.read_text()
    assert f"Not running: job {run.job} (restart 1) on n" in status(run.path)

    submit()
    run.wait_for_file("status/0001-evaluate.json")
    run.cancel()
    assert not (run.path / "rounds/0001/evaluate.json").exists(), "cancelled during the evaluation"
    assert "evaluate  stopped" in status(run.path)

    submit()
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)


def test_a_two_node_run_with_a_slow_worker_survives_a_dead_node_and_preemption(
    cluster, batch_environment, undisturbed, tmp_path
):
    processors = tmp_path / "processors"
    slow = f'[ "$1 $SLURM_PROCID" != "rollout 1" ] || sleep {3 * WAIT_S}'
    before = f"env -u OMP_NUM_THREADS nproc >>{processors}; {slow}"
    variables = {**batch_environment, "BEFORE_STEP": before, "DOCTOR": "yes"}
    run = Run(cluster, tmp_path, variables, "slurm/multi_node.sbatch", "dagger.evaluate_rounds=last")

    # A node does not start: the job fails and names it, and the next job waits for the node.
    cluster.kill_daemon("n2")
    run.submit(*BATCH)
    run.wait_for_log("failed on node n2")
    failed = run.job
    run.submit(*BATCH)
    cluster.wait(
        lambda: cluster.job(run.job)["Reason"] not in ("None", "Priority"), 20, "SLURM to say why the job waits"
    )
    assert cluster.state(run.job) == "PENDING"
    cluster.start_node("n2")
    cluster.wait_for(failed, "FAILED", deadline_s=60)

    run.wait_for_steps(1)
    run.preempt()  # both nodes stop after the same step
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)
    assert cluster.job(run.job)["Restarts"] == "1"
    assert "resuming after step" in (run.path / "logs/train-0000/rank-0.log").read_text()
    text = status(run.path)
    for number in (0, 1):
        assert "2/2 episodes" in (run.path / f"logs/worker-{number}.log").read_text()
        assert f"job {run.job} on n{number + 1}" in text
    assert set(processors.read_text().split()) == {str(len(os.sched_getaffinity(0)))}, "a step has all processors"
    assert "ok       ranks          2 on 2 nodes by gloo" in run.log.read_text(), "the nodes were examined first"
    assert not list(tmp_path.glob(f".doctor-{run.job}-*"))
    assert (run.path / "report.html").exists()
    assert not (run.path / "rounds/0002").exists(), "dagger.rounds=1 means rounds 0 and 1"
