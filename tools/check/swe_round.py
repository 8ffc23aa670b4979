"""Run DAgger rounds on SWE-bench tasks in Docker, end to end, on one machine that pulls no image and has no GPU.

Packages are mutated and become rows of SWE-bench 5.x with images built here (tools.check.swe_mutants). The teacher is a
chat completions server that knows the gold patches. The student is a small Qwen3 with random weights, converted by
`megatron-dagger convert`. Through the command line it then validates the tasks, does a round of the teacher alone and a
round of mixed turns (labels, store, training, weight sync), evaluates, and grades with SWE-bench's own harness: the
gold patches, empty patches, the collected patches and the evaluated ones.

    .venv/bin/python -m tools.check.swe_round              a few minutes
    .venv/bin/python -m tools.check.swe_round --serve      also use the small model as a teacher behind `vllm serve`
    .venv/bin/python -m tools.check.swe_round --source stdlib dagger.rounds=2      without downloads; other settings

It starts its own dockerd, which needs root, and builds an image of this host's programs. The last line is
``RESULT {json}``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    differing,
    override,
)
from megatron_dagger.driver.run_dir import cache_dir, create_run
from megatron_dagger.envs.repo_repair.taskset import TaskSet, prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE
from megatron_dagger.envs.swe.validation import valid_tasks
from megatron_dagger.observability.progress import track
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.local import SandboxPool
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import read_json
from tools.check.swe_mutants import GoldTeacher, build_images, write_rows
from tools.check.swe_served import served
from tools.support.chat_server import chat_server
from tools.support.docker_engine import IMAGE, docker_daemon, missing

ROOT = Path(__file__).resolve().parents[2]
TASKS = {
    "packages": RepoRepairConfig(source="packages", train_packages=("munch", "webcolors"), heldout_packages=("roman",)),
    "stdlib": RepoRepairConfig(
        source="stdlib", train_packages=("textwrap", "graphlib"), heldout_packages=("colorsys",)
    ),
}
TOKENS, VOCABULARY, REPLY_TOKENS = 8192, 1200, 400
DEADLINE_S = 1800.0
SEED = 1234


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--folder", type=Path, help="keep the run in this folder (default: a temporary one)")
    parser.add_argument(
        "--source", choices=sorted(TASKS), default="packages", help="source of the tasks (default %(default)s)"
    )
    parser.add_argument("--train", type=int, default=8, help="training tasks (default %(default)s)")
    parser.add_argument("--heldout", type=int, default=3, help="evaluation tasks (default %(default)s)")
    parser.add_argument(
        "--serve", action="store_true", help="also use the small model as a teacher behind `vllm serve`"
    )
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="other settings of the run")
    arguments = parser.parse_args()
    if missing():
        sys.exit(f"no Docker daemon can be started: {missing()}")
    with tempfile.TemporaryDirectory(prefix="swe-round-") as temporary, docker_daemon() as daemon:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        tasks = make_tasks(arguments.source, arguments.train, arguments.heldout)
        result = run_rounds(folder, tasks, daemon.url, arguments.settings)
        result["check_holds"] = check_holds(folder / "run", daemon.url)
        if arguments.serve:
            result["served"] = served(folder)
    print("RESULT " + json.dumps(result))
    return 0


def run_rounds(
    folder: Path, tasks: TaskSet, docker_url: str, overrides: Sequence[str] = (), *, repeats: int = 2
) -> dict[str, Any]:
    """Run and grade the rounds in ``folder``, on a daemon that has the base image; return the numbers of RESULT.

    ``repeats`` is how often each task is validated, ``overrides`` are further settings of the run.
    """
    all_tasks = [*tasks.train, *tasks.heldout]
    with DockerHost("swe-round", docker_url) as host:
        before = len(host.client.containers.list(all=True))
        build_images(host, IMAGE, all_tasks, tasks.repository)
    teacher = GoldTeacher(all_tasks)
    write_rows(folder / "train.jsonl", all_tasks)  # the run must keep the evaluation tasks out of training by itself
    write_rows(folder / "heldout.jsonl", tasks.heldout)
    model = make_model(folder, tasks, teacher)
    with chat_server(teacher) as server:
        config = settings(folder, model, tasks, docker_url, server.url)
        validate = ("validate", config.swe.validation, "--repeats", repeats)
        seconds = {"validation": cli(*validate, *swe_settings(config))}
        valid = len(valid_tasks(Path(config.swe.validation)))
        halves = [f"dagger.sft_tasks={valid - valid // 2}", f"dagger.tasks_per_round={valid // 2}"]
        create_run(override(config, [*halves, *overrides]), folder / "run")
        seconds["rounds"] = cli("run", folder / "run")
        result: dict[str, Any] = {"valid": valid, "teacher_requests": len(server.requests), "seconds": seconds}
    result |= rounds(folder / "run") | graded(folder, docker_url, seconds)
    with DockerHost("swe-round", docker_url) as host:
        result["leaked_containers"] = len(host.client.containers.list(all=True)) - before
    return result


def swe_settings(config: RunConfig) -> list[str]:
    """Return the settings of the tasks for `megatron-dagger validate`."""
    changed = differing(config.swe, SweConfig())
    return [f"swe.{name}={getattr(config.swe, name)}" for name in changed if name != "validation"]


def make_tasks(source: str, train: int, heldout: int) -> TaskSet:
    config = replace(TASKS[source], train_tasks=train, heldout_tasks=heldout)
    with SandboxPool(repair_sandbox) as pool:
        return prepare_tasks(config, SEED, cache_dir(), pool, track)


def make_model(folder: Path, tasks: TaskSet, teacher: GoldTeacher) -> ModelConfig:
    """Write a small model with random weights to hf/, and its conversion to megatron/; return its architecture."""
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
        "-m",
        "megatron_dagger.cli.main",
        "convert",
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


def cli(*argv: object) -> float:
    """Run the command line and return its seconds."""
    began = time.monotonic()
    command = [sys.executable, "-m", "megatron_dagger.cli.main", *map(str, argv)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=DEADLINE_S)
    return round(time.monotonic() - began, 1)


def rounds(run: Path) -> dict[str, Any]:
    """Return the numbers of each round, and the evaluation's success, from the run's reports."""
    numbers: list[dict[str, Any]] = []
    for folder in sorted((run / "rounds").iterdir()):
        collected, trained = read_json(folder / "collect.json"), read_json(folder / "train" / "manifest.json")
        names = ("episodes", "turns", "labelled_turns", "teacher_turn_share", "agreement", "solved")
        collect_numbers = {name: collected[name] for name in names}
        numbers.append(collect_numbers | {name: trained[name] for name in ("steps", "first_loss", "last_loss")})
    last = read_json(folder / "evaluate.json")
    return {"rounds": numbers, "weight_version": last["weight_version"], "success": last["heldout"]["success"]}


def graded(folder: Path, docker_url: str, seconds: dict[str, float]) -> dict[str, Any]:
    """Grade the last round's collected patches and the evaluated ones with the harness; return the numbers."""
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
    """Return whether the harness resolves every held-out task with its gold patch and none with an empty one."""
    cli("grade", run, "--check", "--docker-url", docker_url, "--workers", 4)
    return bool(read_json(run / "grades" / "check" / "report.json")["holds"])


if __name__ == "__main__":
    sys.exit(main())
