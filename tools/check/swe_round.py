"""DAgger rounds of SWE-bench tasks in Docker, for real, on one machine from which nothing can be pulled.

Packages are mutated and become SWE-bench 5.x's rows with images of this machine; the teacher is a chat
completions server that has read the gold patches; the student, a small Qwen3 with random weights, is converted
by megatron-dagger convert. Then, by the command line as anybody would: the validation of the tasks, a round of the
teacher alone, a round of mixed turns, each with labels, store, training and sync, the evaluation, and the
grading by SWE-bench's own harness: of the gold patches and none, of what was collected, of what was evaluated.

    tools/check/swe_round.py                      a dockerd of its own (as root), an image of this host's programs
    tools/check/swe_round.py --serve              also asks a `vllm serve` of the small model, as a teacher
    tools/check/swe_round.py --source stdlib dagger.rounds=2      nothing is downloaded; settings may be changed
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dagger.config import (
    BetaConfig,
    DaggerConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    RepoRepairConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    SweConfig,
    TeacherConfig,
    TrainingConfig,
    VllmEngineConfig,
    override,
    to_dict,
)
from megatron_dagger.driver.context import cache_dir, create_run
from megatron_dagger.driver.environments import one_tool_call
from megatron_dagger.envs.repo_repair.taskset import TaskSet, prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE
from megatron_dagger.envs.swe.validation import valid_tasks
from megatron_dagger.observability.progress import track
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.policies.openai.scoring import TeacherScores
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox import SandboxPool
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json
from megatron_dagger.types import ActedBy, Action, Message, State, StopReason, Trajectory, Turn
from tools.check.swe_mutants import GoldTeacher, build_images, write_rows
from tools.support.chat_server import chat_server
from tools.support.docker_engine import IMAGE, docker_daemon, missing
from tools.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "packages": RepoRepairConfig(source="packages", train_packages=("munch", "webcolors"), heldout_packages=("roman",)),
    "stdlib": RepoRepairConfig(
        source="stdlib", train_packages=("textwrap", "graphlib"), heldout_packages=("colorsys",)
    ),
}
TOKENS, VOCABULARY, REPLY_TOKENS = 8192, 1200, 400
DEADLINE_S = 1800.0
END_DEADLINE_S = 30.0
SEED = 1234
SERVED = "small"


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, help="where the run goes, to be kept (default: a temporary one)")
    parser.add_argument("--source", choices=sorted(TASKS), default="packages", help="of the tasks")
    parser.add_argument("--train", type=int, default=8, help="training tasks")
    parser.add_argument("--heldout", type=int, default=3, help="tasks to evaluate on")
    parser.add_argument("--serve", action="store_true", help="also ask a `vllm serve` of the small model")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="settings of the run that differ")
    arguments = parser.parse_args()
    if missing():
        sys.exit(f"no Docker daemon can be started: {missing()}")
    with tempfile.TemporaryDirectory(prefix="swe-round-") as temporary, docker_daemon() as daemon:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = make_tasks(arguments.source, arguments.train, arguments.heldout)
        found = run_rounds(folder, tasks, daemon.url, arguments.settings)
        found["check_holds"] = check_holds(folder / "run", daemon.url)
        if arguments.serve:
            found["served"] = served(folder)
    print("RESULT " + json.dumps(found))
    return 0


def run_rounds(
    folder: Path, tasks: TaskSet, docker_url: str, changed: Sequence[str] = (), *, repeats: int = 2
) -> dict[str, Any]:
    """The rounds and their grading, in ``folder``, on a daemon that has the base image; what came of them.

    ``repeats``: of the validation. ``changed``: settings of the run.
    """
    every = [*tasks.train, *tasks.heldout]
    with DockerHost("swe-round", docker_url) as host:
        before = len(host.client.containers.list(all=True))
        build_images(host, IMAGE, every, tasks.repository)
    teacher = GoldTeacher(every)
    write_rows(folder / "train.jsonl", every)  # what is evaluated on stays out of training all the same
    write_rows(folder / "heldout.jsonl", tasks.heldout)
    model = make_model(folder, tasks, teacher)
    with chat_server(teacher) as server:
        config = settings(folder, model, tasks, docker_url, server.url)
        given = [f"swe.{name}={value}" for name, value in to_dict(config.swe).items() if name != "validation"]
        seconds = {"validation": cli("validate", config.swe.validation, "--repeats", repeats, *given)}
        fit = len(valid_tasks(Path(config.swe.validation)))
        changed = [f"dagger.sft_tasks={fit - fit // 2}", f"dagger.tasks_per_round={fit // 2}", *changed]
        create_run(override(config, changed), folder / "run")
        seconds["rounds"] = cli("run", folder / "run")
        found: dict[str, Any] = {"valid": fit, "teacher_requests": len(server.requests), "seconds": seconds}
    found |= rounds(folder / "run") | graded(folder, docker_url, seconds)
    with DockerHost("swe-round", docker_url) as host:
        found["leaked_containers"] = len(host.client.containers.list(all=True)) - before
    return found


def make_tasks(source: str, train: int, heldout: int) -> TaskSet:
    config = replace(TASKS[source], train_tasks=train, heldout_tasks=heldout)
    with SandboxPool(repair_sandbox) as pool:
        return prepare_tasks(config, SEED, cache_dir(), pool, track)


def make_model(folder: Path, tasks: TaskSet, teacher: GoldTeacher) -> ModelConfig:
    """A small model with random weights: ``hf`` in Transformers' form, ``megatron`` converted from it."""
    import torch
    import transformers

    model = ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        init_std=0.1,
    )
    torch.manual_seed(SEED)
    network = transformers.Qwen3Config(**model.hf_config() | {"head_dim": model.kv_channels})
    transformers.Qwen3ForCausalLM(network).save_pretrained(folder / "hf")
    replies = [reply for task in tasks.train for reply in teacher.replies(task)]
    sources = [tree.files[name].decode() for tree in tasks.trees for name in tree.source_files]
    statements = [task.problem_statement for task in tasks.train]
    train_tokenizer([*[SYSTEM_MESSAGE] * 20, *sources, *replies, *statements], VOCABULARY, folder / "hf")
    convert = [
        sys.executable,
        str(ROOT / "megatron_dagger/cli/convert.py"),
        "hf-to-megatron",
        f"{folder}/hf",
        f"{folder}/megatron",
    ]
    subprocess.run(convert, check=True, timeout=DEADLINE_S, stdout=subprocess.DEVNULL)
    return model


def settings(folder: Path, model: ModelConfig, tasks: TaskSet, docker_url: str, teacher_url: str) -> RunConfig:
    sampling = SamplingConfig(max_tokens=REPLY_TOKENS)
    return RunConfig(
        name="swe_round",
        seed=SEED,
        model=model,
        init_checkpoint=str(folder / "megatron"),
        training=TrainingConfig(
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5),
            sequence_length=TOKENS,
            global_batch_tokens=TOKENS,
            packing="shared_prefix",
            epochs=100,
            max_steps=20,
        ),
        rollout=RolloutConfig(
            sampling=sampling,
            engine=VllmEngineConfig(max_model_len=TOKENS, max_num_seqs=16),
            limits=LimitsConfig(max_tokens=TOKENS, max_turns=10, max_format_errors=3),
            concurrent_episodes=4,
        ),
        evaluation_sampling=SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=REPLY_TOKENS),
        swe=SweConfig(
            train=str(folder / "train.jsonl"),
            train_dataset="swe-bench",
            validation=str(folder / "validation.json"),
            heldout=str(folder / "heldout.jsonl"),
            docker_url=docker_url,
            cpus=1.0,
            memory_mib=500,
            disk_mib=200,
            processes=64,
            command_timeout_s=60.0,
        ),
        teacher=TeacherConfig(urls=(teacher_url,), model="gold", sampling=SamplingConfig(max_tokens=REPLY_TOKENS)),
        dagger=DaggerConfig(
            rounds=1,
            beta=BetaConfig(schedule="constant", start=0.5),
            evaluation_tasks=len(tasks.heldout),
            evaluate_rounds="last",
        ),
    )


def cli(*words: object) -> float:
    """Run our command line; the seconds it took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "megatron_dagger.cli.main", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE_S)
    return round(time.monotonic() - began, 1)


def rounds(run: Path) -> dict[str, Any]:
    """What the stages of each round have written."""
    found: list[dict[str, Any]] = []
    for folder in sorted((run / "rounds").iterdir()):
        collected, trained = read_json(folder / "collect.json"), read_json(folder / "train" / "manifest.json")
        names = ("episodes", "turns", "labelled_turns", "teacher_turn_share", "agreement", "solved")
        one = {name: collected[name] for name in names}
        found.append(one | {name: trained[name] for name in ("steps", "first_loss", "last_loss")})
    last = read_json(folder / "evaluate.json")
    return {"rounds": found, "weight_version": last["weight_version"], "success": last["heldout"]["success"]}


def graded(folder: Path, docker_url: str, seconds: dict[str, float]) -> dict[str, Any]:
    """The harness on the patches collected last, and on the evaluated ones."""
    run, common = folder / "run", ("--docker-url", docker_url, "--workers", "4")
    store = DataStore.open(run / "data.zarr")
    index, predictions = max(store.rounds()), folder / "collected.jsonl"
    cli("export", run, "--format", "predictions", "--round", index, "--out", predictions)
    tasks = ("--tasks", folder / "train.jsonl", "--predictions", predictions)
    seconds["collected"] = cli("grade", *tasks, "--out", folder / "collected", *common)
    outcomes = read_json(folder / "collected" / "report.json")["outcomes"]
    episodes = list(store.episodes(index))
    resolved = {episode.task_id for episode in episodes if outcomes[episode.task_id] == "resolved"}
    seconds["heldout"] = cli("grade", run, *common)
    heldout = read_json(run / "grades" / f"round-{index:04d}" / "report.json")
    trained_on = {episode.task_id for number in store.rounds() for episode in store.episodes(number)}
    return {
        "heldout_trained_on": len(trained_on & set(heldout["outcomes"])),
        "collected_resolved": len(resolved),
        "judge_agrees": sum(episode.solved == (episode.task_id in resolved) for episode in episodes),
        "heldout": {name: heldout[name] for name in ("tasks", "resolved", "rate", "ci_low", "ci_high", "counts")},
    }


def check_holds(run: Path, docker_url: str) -> bool:
    """Whether the harness resolves the held-out tasks by their gold patches, and none by none."""
    cli("grade", run, "--check", "--docker-url", docker_url, "--workers", 4)
    return bool(read_json(run / "grades" / "check" / "report.json")["holds"])


def served(folder: Path) -> dict[str, Any]:
    """The small model behind vLLM's own server, as the teacher: asked for a label, and about a student's tokens.

    Random weights call no tool, which must be told; the log-probs are compared with Transformers'.
    """
    with vllm_serve(folder) as url:
        renderer, replies = ChatRenderer.load(folder / "hf"), ResponseCache(folder / "teacher")
        teacher = TeacherConfig(urls=(url,), model=SERVED, sampling=SamplingConfig(max_tokens=32))
        policy = EndpointPolicy(teacher, replies, read=one_tool_call, encode=renderer.action)
        messages = (Message(role="system", content=SYSTEM_MESSAGE), Message(role="user", content="Repair it."))
        prompt = renderer.opening(*[message.content for message in messages])
        try:
            label = asyncio.run(policy.act(State(messages=messages, tokens=prompt, seed=SEED))).text
        except PolicyError as error:
            label = str(error)
        reply = renderer.action("I would look at the tests first.")
        turn = Turn(
            observation="",
            prompt_tokens=prompt,
            acted_by=ActedBy.STUDENT,
            action=Action(text="", tokens=reply),
            label=None,
        )
        episode = Trajectory(
            task_id="served", attempt=0, round_index=0, turns=(turn,), stop_reason=StopReason.SUBMITTED, solved=False
        )
        scores = TeacherScores(teacher, policy.replicas, replies, decode=renderer.text)
        found = asyncio.run(scores.score(episode)).turns[0].teacher_logprobs
        replies.close()
    wanted = transformers_logprobs(folder / "hf", np.concatenate([prompt, reply]))[-len(reply) :]
    differ = float(np.abs(found - wanted).max())
    return {"replies": len(replies), "tokens": replies.completion_tokens, "label": label[:200], "scores_differ": differ}


@contextmanager
def vllm_serve(folder: Path) -> Iterator[str]:
    """vLLM's server of the small model; its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder / "hf", "--port", port]
    command += ["--host", "127.0.0.1", "--max-model-len", TOKENS, "--enforce-eager", "--served-model-name", SERVED]
    command += ["--dtype", "float32"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (
        open(folder / "serve.log", "wb") as log,
        subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + DEADLINE_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"vllm serve does not start: see {folder / 'serve.log'}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            try:
                server.wait(END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                server.kill()


def transformers_logprobs(model: Path, tokens: np.ndarray) -> np.ndarray:
    """Of each token but the first, (n - 1,)."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = network(ids).logits[0, :-1]
    found: np.ndarray = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].numpy()
    return found


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
