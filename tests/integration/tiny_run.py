"""A run of two rounds that takes a minute, and the comparison of two such runs."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dagger.store.aggregated import DataStore

SETTINGS = [
    "repo_repair.source=stdlib",
    "repo_repair.train_packages=[textwrap,graphlib]",
    "repo_repair.heldout_packages=[colorsys]",
    "repo_repair.train_tasks=8",
    "repo_repair.heldout_tasks=3",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.ffn_hidden_size=128",
    "model.num_query_groups=4",
    "model.vocab_size=600",
    "model.max_position_embeddings=2048",
    "training.parallel.tensor_model_parallel_size=1",
    "training.parallel.pipeline_model_parallel_size=2",
    "training.parallel.world_size=2",
    "training.sequence_length=2048",
    "training.global_batch_tokens=4096",
    "training.epochs=20",
    "training.max_steps=20",
    "rollout.sampling.temperature=0.2",  # at higher ones the student runs commands such as w, which prints the time
    "training.checkpoint_interval=2",
    "rollout.limits.max_tokens=2048",
    "rollout.limits.max_turns=24",
    "rollout.engine.max_model_len=2048",
    "dagger.rounds=1",
    "dagger.sft_tasks=4",
    "dagger.tasks_per_round=4",
    "dagger.evaluation_tasks=3",
]
ARGUMENTS = ["--recipe", "short_repair", *SETTINGS]
DEADLINE_S = 400


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "megatron_dagger.cli.main", "run", str(run), *ARGUMENTS]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MEGATRON_DAGGER_CACHE": str(cache), "PYTHONPATH": str(Path.cwd())}


def manifest(run: Path, round_index: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / f"rounds/{round_index:04d}/train/manifest.json").read_text())
    return values


def drift(run: Path, round_index: int) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / f"rounds/{round_index:04d}/evaluate.json").read_text())["drift"]
    return values


def losses(run: Path, round_index: int) -> list[float]:
    lines = (run / f"rounds/{round_index:04d}/train/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_same(run: Path, undisturbed: Path, rounds: Sequence[int] = (0, 1)) -> None:
    """Assert that ``run`` equals ``undisturbed``: the same episodes, each once, the same losses and weights."""
    for round_index in rounds:
        expected, actual = (DataStore.open(r / "data.zarr").manifest(round_index) for r in (undisturbed, run))
        assert actual is not None
        assert expected is not None
        assert actual.to_dict() == expected.to_dict()
        assert losses(run, round_index) == losses(undisturbed, round_index)
        assert manifest(run, round_index)["digests"] == manifest(undisturbed, round_index)["digests"]


def assert_same_evaluations(run: Path, undisturbed: Path) -> None:
    """Assert that ``run``'s evaluations and their diagnosis equal those of ``undisturbed``, each episode once."""
    for name in ("evaluations", "references", "takeovers"):
        expected, actual = (DataStore.open(folder / f"{name}.zarr") for folder in (undisturbed, run))
        assert actual.sealed() == expected.sealed()
        assert actual.digest() == expected.digest()
    for round_index in (0, 1):
        assert drift(run, round_index) == drift(undisturbed, round_index)


def writers(log: Path) -> list[int]:
    """Return the ids of the processes whose standard output is ``log``: a rank, and those that it forked."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "fd" / "1") == str(log):
                pids.append(int(process.name))
    return sorted(pids)
