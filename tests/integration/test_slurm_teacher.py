"""Runs on a real SLURM whose teacher is served within the same job."""

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
from tests.integration.slurm_runs import ROOT, Run, command_line
from tests.integration.tiny_run import assert_same, manifest
from tools.support.ports import free_port
from tools.virtual_slurm.packages import why_unavailable
from tools.virtual_slurm.processes import environment_variable
from tools.virtual_slurm.settings import adapt_to_cluster

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow, pytest.mark.usefixtures("clean_cluster")]
TEACHER = ("teacher.urls=[http://localhost:9/v1]", "teacher.model=expert")

if reason := why_unavailable():
    pytest.skip(reason, allow_module_level=True)


def served_by_the_expert(batch_environment, port):
    """Return job variables under which the environment's expert is served as the teacher."""
    return {
        **batch_environment,
        "PAUSE": "1",
        "SERVE": f"{sys.executable} -m tools.support.chat_server {port}",
        "MEGATRON_DAGGER_TEACHER_URLS": f"http://127.0.0.1:{port}/v1",  # other hosts could not resolve the nodes' names
    }


def teachers(cluster):
    """Return the process ids of the expert's servers."""
    return [pid for pid in cluster.job_processes() if command_line(pid)[2:3] == ["tools.support.chat_server"]]


def test_a_resident_run_with_a_teacher_survives_preemption(cluster, batch_environment, undisturbed, tmp_path):
    file = adapt_to_cluster(ROOT / "slurm/resident.sbatch", tmp_path)
    variables = {**served_by_the_expert(batch_environment, free_port()), "DOCTOR": "yes"}
    run = Run(cluster, tmp_path, variables, file, *TEACHER)
    run.submit()
    run.wait(lambda: run.steps(1) >= 1, "the training of round 1")
    run.preempt(run.rank(0, "train"))
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed)
    assert cluster.job(run.job)["Restarts"] == "1"
    rank = (run.path / "logs/train/rank-0.log").read_text()
    assert "resuming after step" in rank
    assert "a rollout engine took weights 1 (shared_memory)" in rank
    assert run.log.read_text().count("ok       packages") == 2, (
        "both kinds of nodes were examined, before the preemption"
    )
    assert (run.path / "report.html").exists()


def test_teacher_and_training_take_turns_on_a_nodes_gpus_and_survive_preemption(
    cluster, batch_environment, undisturbed, tmp_path
):
    file = adapt_to_cluster(ROOT / "slurm/single_node_with_teacher.sbatch", tmp_path)
    halves = {"TEACHER_GPUS": "0,1", "STUDENT_GPUS": "2,3"}
    served = {**served_by_the_expert(batch_environment, free_port()), **halves}
    run = Run(cluster, tmp_path, served, file, *TEACHER, "dagger.rounds=0")

    def gpus(processes):
        return {environment_variable(pid, "CUDA_VISIBLE_DEVICES") for pid in processes}

    run.submit()
    run.wait(lambda: any(path.stat().st_size for path in run.path.glob("teacher/*.jsonl")), "the first reply")
    (server,) = teachers(cluster)
    assert (gpus([server]), gpus(run.drivers())) == ({"0,1"}, {"2,3"})
    run.preempt(server)
    run.wait_for_restart(1)
    assert not (run.path / "rounds/0000/collect.json").exists(), "preempted during the collection"
    run.wait_for_steps(1)
    rank = run.rank(0)
    os.kill(rank, signal.SIGSTOP)
    assert (teachers(cluster), gpus(run.drivers())) == ([], {"0,1,2,3"})
    os.kill(rank, signal.SIGCONT)
    run.wait_for_end("COMPLETED")
    assert_same(run.path, undisturbed, rounds=[0])
    assert (run.path / "report.html").exists()


def test_a_run_survives_a_killed_teacher_server_and_a_full_disk(cluster, batch_environment, undisturbed, tmp_path):
    file = adapt_to_cluster(ROOT / "slurm/with_teacher_servers.sbatch", tmp_path)
    served = served_by_the_expert(batch_environment, free_port())
    run = Run(cluster, tmp_path, served, file, *TEACHER, "dagger.rounds=0")

    with small_disk(run.path, "48m"):
        run.submit()
        run.wait(lambda: any(path.stat().st_size for path in run.path.glob("teacher/*.jsonl")), "the first reply")
        (first,) = teachers(cluster)
        os.kill(first, signal.SIGKILL)
        run.wait(lambda: teachers(cluster) not in ([], [first]), "the teacher's server to restart")
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
    """Return job variables under which `vllm serve` serves the student of ``run`` from its last checkpoint."""
    checkpoint = f'{{"checkpoint":"{run}/rounds/0001/train/checkpoint"}}'  # one word of the shell, so no spaces
    # `vllm serve` by its module, because the command of the CPU build does not start.
    serve = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {run}/student --port {port}"
    weights = f"--load-format megatron --model-loader-extra-config {checkpoint} --dtype float32"
    options = "--host 127.0.0.1 --served-model-name small --enforce-eager"
    return {
        **batch_environment,
        "SERVE": f"{serve} {weights} {options}",
        "MEGATRON_DAGGER_TEACHER_URLS": f"http://127.0.0.1:{port}/v1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no worker processes, since each would import vLLM again
    }


def served_logprobs(port, tokens):
    """Return the server's log-probs of ``tokens`` but the first."""
    body = {"model": "small", "prompt": tokens, "max_tokens": 1, "prompt_logprobs": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        rows = json.load(reply)["choices"][0]["prompt_logprobs"]
    return [row[str(token)]["logprob"] for row, token in zip(rows[1:], tokens[1:], strict=True)]


def test_vllm_serves_the_teacher_within_the_job(cluster, batch_environment, undisturbed, tmp_path):
    """The teacher is a barely trained student: its labels are poor, but they are collected and trained on."""
    file, port = adapt_to_cluster(ROOT / "slurm/with_teacher_servers.sbatch", tmp_path), free_port()
    served = served_by_vllm(batch_environment, undisturbed, port)
    few = ("dagger.sft_tasks=2", "dagger.evaluation_tasks=1", "rollout.limits.max_turns=3", "training.max_steps=2")
    teacher = ("teacher.urls=[http://localhost:9/v1]", "teacher.model=small", "teacher.sampling.max_tokens=16")
    run = Run(cluster, tmp_path, served, file, "dagger.rounds=0", *few, *teacher)
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
    """Mount a file system of ``size`` at ``folder`` while the block runs."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path):
    """Write to a file until the disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65536))
