"""Whole runs by the sbatch files on a real SLURM of two nodes, with all that clusters do to jobs.

Each run goes through many faults, one after the other, and must come to the end of the undisturbed one: starting an
engine is what takes the time, and faults before the first engine's start are had for less.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

from megatron_dagger.config import build
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.observability.status import status
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.lock import LockedError, flocked
from megatron_dagger.weights.canary import Canary
from tests.integration.tiny_run import ARGUMENTS, DEADLINE_S, assert_same, environment, manifest, writers
from tools import slurm_processes
from tools.ports import free_port
from tools.slurm_cluster import fitted
from tools.slurm_packages import lacking

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
BATCH = ("--gpus-per-node=4", "--mem=8000")

if why := lacking():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def batch_environment(cache, tmp_path_factory):
    """An environment's folder with the command line, and addresses for two nodes that are one host."""
    folder = tmp_path_factory.mktemp("venv")
    script = folder / "bin" / "megatron-dagger"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_dagger.cli.main "$@"\n')
    script.chmod(0o755)
    network = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**environment(cache), "VENV": str(folder), "PYTHONPATH": str(ROOT), **network}


@pytest.fixture(autouse=True)
def in_order(cluster):
    """What a test that failed has left must not hold up the next one."""
    yield
    cluster.restore()


def words(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return [""]


def parent(pid):
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


class Run:
    """A run that one job after the other works on, by the same sbatch file with the same arguments."""

    def __init__(self, cluster, folder, environment, file, *settings):
        self.cluster, self.folder, self.environment = cluster, folder, environment
        self.path = folder / "run"
        self.arguments = (str(file), str(self.path), *ARGUMENTS, *settings)
        self.job = self.log = None

    def submit(self, *options):
        self.log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}"
        options = (*options, f"--chdir={ROOT}", f"--output={self.log}")
        self.job = self.cluster.submit(*options, *self.arguments, env=self.environment)

    def wait(self, condition, what):
        def reached():
            state = self.cluster.state(self.job)
            assert state in ("PENDING", "RUNNING", "COMPLETING"), f"waiting for {what}: {state}\n{self.log.read_text()}"
            return condition()

        self.cluster.wait(reached, DEADLINE_S, what, lambda: self.cluster.log(self.job))

    def wait_for_file(self, name):
        self.wait((self.path / name).exists, name)

    def wait_for_words(self, words):
        self.wait(lambda: self.log.exists() and words in self.log.read_text(), words)

    def wait_for_steps(self, count):
        self.wait(lambda: self.steps() >= count, f"step {count}")

    def wait_for_restart(self, count):
        def restarted():
            job = self.cluster.job(self.job)
            return job["Restarts"] == str(count) and job["JobState"] == "RUNNING"

        self.wait(restarted, f"restart {count}")

    def wait_for_end(self, state):
        """The job ends so, and leaves no process."""
        self.cluster.wait_for(self.job, state, deadline_s=DEADLINE_S)
        assert_nothing_is_left(self.cluster)

    def cancel(self):
        self.cluster.call("scancel", self.job)
        self.wait_for_end("CANCELLED")

    def steps(self, round_index=0):
        """How many of a round's training are done."""
        return len(read_lines(self.path / f"rounds/{round_index:04d}/train/metrics.jsonl"))

    def rank(self, number, logs="train-0000"):
        """The process of a rank of round 0's training, or of one with other ``logs``; not what it forks."""
        found = writers(self.path / f"logs/{logs}/rank-{number}.log")
        return next(pid for pid in found if parent(pid) not in found)

    def drivers(self):
        """The job's processes of our command line; not what they fork and start."""
        return [pid for pid in self.cluster.job_processes(self.job) if "megatron_dagger.cli.main" in words(pid)]

    def preempt(self, held=None):
        """A job of a higher partition wants all of both nodes, for a moment, while ``held`` (a rank) is in a step."""
        held = held or self.rank(0)
        os.kill(held, signal.SIGSTOP)  # or a quick machine may have done it all before it is asked
        urgent = "--partition=high", "--nodes=2", "--exclusive", "--mem=0", "--output=/dev/null", "--wrap=true"
        job = self.cluster.submit(*urgent)
        self.wait_for_words("SIGUSR1: stopping; the same command goes on from here")
        os.kill(held, signal.SIGCONT)
        self.cluster.wait_for(job, "COMPLETED", deadline_s=60)


def stop_between_writes(pid, run):
    """SIGSTOP, but not while it puts something in place: then nobody may take the run over."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with contextlib.suppress(LockedError), flocked(run / ".fence", deadline_s=0.2):
            return
        os.kill(pid, signal.SIGCONT)


def assert_nothing_is_left(cluster):
    cluster.wait(lambda: not cluster.job_processes(), 20, "the jobs' processes to be gone")


def test_a_killed_maker_leaves_no_cluster_behind():
    code = (
        "import os, signal; from tools.slurm_cluster import SlurmCluster\n"
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
            [sys.executable, "tools/bench_slurm.py"], cwd=ROOT, env={**batch_environment, "TMPDIR": folder}
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


def served_by_the_expert(batch_environment, port):
    """A teacher's server: the expert behind the API."""
    return {
        **batch_environment,
        "PAUSE": "1",
        "SERVE": f"{sys.executable} -m tests.unit.policies.endpoint_server {port}",
        "MEGATRON_DAGGER_TEACHER_URLS": f"http://127.0.0.1:{port}/v1",  # the nodes' names are this host's only
    }


ASKED = ("teacher.urls=[http://localhost:9/v1]", "teacher.model=expert")


def teachers(cluster):
    """The servers of the expert."""
    return [pid for pid in cluster.job_processes() if words(pid)[2:3] == ["tests.unit.policies.endpoint_server"]]


def test_trainer_workers_and_teacher_live_through_all_rounds_and_a_preemption(
    cluster, batch_environment, undisturbed, tmp_path
):
    """The file as it is, but for the size of the nodes."""
    file = fitted(ROOT / "slurm/resident.sbatch", tmp_path)
    run = Run(cluster, tmp_path, served_by_the_expert(batch_environment, free_port()), file, *ASKED)
    run.submit()
    run.wait(lambda: run.steps(1) >= 1, "the training of round 1")
    run.preempt(run.rank(0, "train"))
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)
    assert cluster.job(run.job)["Restarts"] == "1"
    rank = (run.path / "logs/train/rank-0.log").read_text()
    assert "resuming after step" in rank
    assert "an engine took weights 1 (host)" in rank
    assert (run.path / "report.html").exists()


def test_the_teacher_and_the_training_have_a_nodes_gpus_in_turns_and_are_preempted(
    cluster, batch_environment, undisturbed, tmp_path
):
    """The file as it is, but for the size of the node."""
    file = fitted(ROOT / "slurm/single_node_with_teacher.sbatch", tmp_path)
    halves = {"TEACHER_GPUS": "0,1", "STUDENT_GPUS": "2,3"}
    served = {**served_by_the_expert(batch_environment, free_port()), **halves}
    run = Run(cluster, tmp_path, served, file, *ASKED, "dagger.rounds=0")

    def gpus(processes):
        return {slurm_processes.variable(pid, "CUDA_VISIBLE_DEVICES") for pid in processes}

    run.submit()
    run.wait(lambda: any(path.stat().st_size for path in run.path.glob("teacher/*.jsonl")), "the first reply")
    (server,) = teachers(cluster)
    assert (gpus([server]), gpus(run.drivers())) == ({"0,1"}, {"2,3"})
    run.preempt(server)
    run.wait_for_restart(1)
    assert not (run.path / "rounds/0000/collect.json").exists(), "it was in the middle of the collection"
    run.wait_for_steps(1)
    rank = run.rank(0)
    os.kill(rank, signal.SIGSTOP)
    assert (teachers(cluster), gpus(run.drivers())) == ([], {"0,1,2,3"})
    os.kill(rank, signal.SIGCONT)
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed, rounds=[0])
    assert (run.path / "report.html").exists()


def test_a_run_beside_the_servers_of_its_teacher_which_die_and_on_a_disk_that_fills(
    cluster, batch_environment, undisturbed, tmp_path
):
    """The file as it is, but for the size of the nodes, with the expert behind the API as what is served."""
    file = fitted(ROOT / "slurm/with_teacher_servers.sbatch", tmp_path)
    served = served_by_the_expert(batch_environment, free_port())
    run = Run(cluster, tmp_path, served, file, *ASKED, "dagger.rounds=0")

    with small_disk(run.path, "48m"):
        run.submit()
        run.wait(lambda: any(path.stat().st_size for path in run.path.glob("teacher/*.jsonl")), "the first reply")
        (first,) = teachers(cluster)
        os.kill(first, signal.SIGKILL)
        run.wait(lambda: teachers(cluster) not in ([], [first]), "another server")
        assert not (run.path / "rounds/0000/collect.json").exists()
        run.wait_for_steps(1)
        fill(run.path / "ballast")
        run.wait_for_end("FAILED")
        assert f"no space left to write {run.path}" in run.log.read_text()
        assert not (run.path / "rounds/0000/train/manifest.json").exists()

        (run.path / "ballast").unlink()
        run.submit()
        run.wait_for_file("rounds/0000/train/manifest.json")
        run.cancel()
        assert_same(run.path, undisturbed, rounds=[0])


def served_by_vllm(batch_environment, run, port):
    """A teacher's server: vLLM's own, of another run's student, straight from its last checkpoint."""
    checkpoint = f'{{"checkpoint":"{run}/rounds/0001/train/checkpoint"}}'  # without blanks: a word of the shell
    # `vllm serve`, by its module: the command of the build for CPUs does not start.
    serve = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {run}/student --port {port}"
    weights = f"--load-format megatron --model-loader-extra-config {checkpoint} --dtype float32"
    options = "--host 127.0.0.1 --served-model-name small --enforce-eager"
    return {
        **batch_environment,
        "SERVE": f"{serve} {weights} {options}",
        "MEGATRON_DAGGER_TEACHER_URLS": f"http://127.0.0.1:{port}/v1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process of its own for a worker: each imports it all anew
    }


def served_logprobs(port, tokens):
    asked = {"model": "small", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        rows = json.load(reply)["choices"][0]["prompt_logprobs"]
    return [row[str(token)]["logprob"] for row, token in zip(rows[1:], tokens[1:], strict=True)]


def test_vllm_serves_the_teacher_beside_a_run(cluster, batch_environment, undisturbed, tmp_path):
    """It has learned little: the labels are worth little, and all the same everything is done with them."""
    file, port = fitted(ROOT / "slurm/with_teacher_servers.sbatch", tmp_path), free_port()
    served = served_by_vllm(batch_environment, undisturbed, port)
    few = ("dagger.sft_tasks=2", "dagger.evaluation_tasks=1", "rollout.limits.max_turns=3", "training.max_steps=2")
    asked = ("teacher.urls=[http://localhost:9/v1]", "teacher.model=small", "teacher.sampling.max_tokens=16")
    run = Run(cluster, tmp_path, served, file, "dagger.rounds=0", *few, *asked)
    run.submit()
    run.wait(lambda: any(path.stat().st_size for path in run.path.glob("teacher/*.jsonl")), "the first reply")
    canary = build(Canary, manifest(undisturbed, 1)["canary"])
    assert canary.problem(served_logprobs(port, canary.tokens), "float32") is None
    run.wait_for_end("COMPLETED")

    episodes = list(DataStore.open(run.path / "data.zarr").episodes(0))
    labels = {turn.label.text for episode in episodes for turn in episode.turns}
    replies = [reply for path in run.path.glob("teacher/*.jsonl") for reply in read_lines(path)]
    assert len(episodes) == 2
    assert labels <= {reply["text"].strip().splitlines()[-1].strip() for reply in replies if reply["text"].strip()}
    assert all(0 < reply["completion_tokens"] <= 16 for reply in replies)
    assert run.log.read_text().count('"POST /v1/chat/completions HTTP/1.1" 200') == len(replies) >= 3
    assert run.steps() == 2
    assert (run.path / "report.html").exists()


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of ``size`` at ``folder``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
    """Let a file take all the room that is left."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
