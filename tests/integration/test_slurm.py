"""Whole runs by the sbatch files on a real SLURM of two nodes, with all that clusters do to jobs.

Each run goes through many faults, one after the other, and must come to the end of the undisturbed one: starting an
engine is what takes the time, and faults before the first engine's start are had for less.
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
from tools.virtual_slurm.packages import lacking

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.usefixtures("in_order")]
BATCH = ("--gpus-per-node=4", "--mem=8000")

if why := lacking():
    pytest.skip(why, allow_module_level=True)


def stop_between_writes(pid, run):
    """SIGSTOP, but not while it puts something in place: then nobody may take the run over."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(LockedError), flocked(run / ".fence", deadline_s=0.2):
            return
        os.kill(pid, signal.SIGCONT)


def test_a_killed_maker_leaves_no_cluster_behind():
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


def test_a_terminated_benchmark_leaves_nothing_behind(batch_environment, undisturbed):
    with tempfile.TemporaryDirectory() as folder:  # a short path: munge's socket will lie in it
        bench = subprocess.Popen(
            [sys.executable, "tools/bench/slurm.py"], cwd=ROOT, env={**batch_environment, "TMPDIR": folder}
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


def test_cancelled_killed_preempted_and_with_a_surviving_twin_it_comes_to_the_same_end(
    cluster, batch_environment, undisturbed, tmp_path
):
    run = Run(cluster, tmp_path, batch_environment, "slurm/single_node.sbatch", "dagger.evaluate_rounds=last")
    submit = functools.partial(run.submit, *BATCH)

    submit()
    run.wait_for_file("status/0000-collect.json")
    run.cancel()
    assert not (run.path / "rounds/0000/collect.json").exists(), "it was in the middle of the collection"

    # Its node is lost, while the driver is stopped; it is begun anew on the other, and the driver goes on.
    submit()
    run.wait_for_file("status/0000-collect.json")
    run.wait(lambda: len(run.drivers()) == 1, "the driver")
    (twin,) = run.drivers()
    run.wait(lambda: f'"pid": {twin}' in (run.path / "status/0000-collect.json").read_text(), "its collection")
    stop_between_writes(twin, run.path)
    lost = cluster.job(run.job)["NodeList"]
    cluster.kill_node(lost)
    run.wait_for_restart(1)
    assert cluster.job(run.job)["NodeList"] != lost
    run.wait(lambda: '"restart": 1' in (run.path / ".fence").read_text(), "the new driver")
    assert twin in cluster.job_processes(run.job)
    os.kill(twin, signal.SIGCONT)
    run.wait(lambda: twin not in cluster.job_processes(run.job), "the twin's end")
    assert "has taken this run over" in (run.path / "logs/driver.log").read_text() + run.log.read_text()
    cluster.start_node(lost)
    run.wait_for_steps(1)
    run.cancel()
    assert not (run.path / "rounds/0000/train/manifest.json").exists(), "it was in the middle of the training"

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
    assert not (run.path / "rounds/0001/evaluate.json").exists(), "it was in the middle of the evaluation"
    assert "evaluate  stopped" in status(run.path)

    submit()
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)


def test_two_nodes_collect_and_train_and_are_preempted_to_the_same_end(
    cluster, batch_environment, undisturbed, tmp_path
):
    run = Run(cluster, tmp_path, batch_environment, "slurm/multi_node.sbatch", "dagger.evaluate_rounds=last")

    # One of its nodes does not come up: the job fails and names it, and the next one waits for the node.
    cluster.kill_daemon("n2")
    run.submit(*BATCH)
    run.wait_for_words("failed on node n2")
    failed = run.job
    run.submit(*BATCH)
    cluster.wait(lambda: cluster.job(run.job)["Reason"] not in ("None", "Priority"), 20, "the reason to wait")
    assert cluster.state(run.job) == "PENDING"
    cluster.start_node("n2")
    cluster.wait_for(failed, "FAILED", deadline_s=60)

    run.wait_for_steps(1)
    run.preempt()  # the nodes stop after the same step
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)
    assert cluster.job(run.job)["Restarts"] == "1"
    assert "resuming after step" in (run.path / "logs/train-0000/rank-0.log").read_text()
    text = status(run.path)
    for number in (0, 1):
        assert "2/2 episodes" in (run.path / f"logs/worker-{number}.log").read_text()
        assert f"job {run.job} on n{number + 1}" in text
    assert (run.path / "report.html").exists()
    assert not (run.path / "rounds/0002").exists(), "the rounds are those of the settings"
