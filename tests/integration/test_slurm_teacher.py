"""Runs on a real SLURM that have their teacher's servers in the same job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest

from megatron_dagger.config import build
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.weights.verify.canary import Canary
from tests.integration.slurm_runs import ROOT, Run, words
from tests.integration.tiny_run import assert_same, manifest
from tools.support.ports import free_port
from tools.virtual_slurm import processes as slurm_processes
from tools.virtual_slurm.cluster import fitted
from tools.virtual_slurm.packages import lacking

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.usefixtures("in_order")]
ASKED = ("teacher.urls=[http://localhost:9/v1]", "teacher.model=expert")

if why := lacking():
    pytest.skip(why, allow_module_level=True)


def served_by_the_expert(batch_environment, port):
    """A teacher's server: the expert behind the API."""
    return {
        **batch_environment,
        "PAUSE": "1",
        "SERVE": f"{sys.executable} -m tools.support.chat_server {port}",
        "MEGATRON_DAGGER_TEACHER_URLS": f"http://127.0.0.1:{port}/v1",  # the nodes' names are this host's only
    }


def teachers(cluster):
    """The servers of the expert."""
    return [pid for pid in cluster.job_processes() if words(pid)[2:3] == ["tools.support.chat_server"]]


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
