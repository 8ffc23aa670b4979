"""A run of two rounds in a minute, and what must be equal between two of them, however they were disturbed."""

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
    "rollout.sampling.temperature=0.2",  # a wild student types commands such as w, which show the clock
    "training.checkpoint_interval=2",
    "rollout.limits.max_tokens=2048",
    "rollout.limits.max_turns=24",
    "rollout.engine.max_model_len=2048",
    "dagger.rounds=1",
    "dagger.sft_tasks=4",
    "dagger.tasks_per_round=4",
    "dagger.evaluation_tasks=3",
]
ARGUMENTS = ["--recipe", "quickstart", *SETTINGS]
DEADLINE_S = 400


def command(run: Path) -> list[str]:
    return [sys.executable, "-m", "megatron_dagger.cli.main", "run", str(run), *ARGUMENTS]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "MEGATRON_DAGGER_CACHE": str(cache), "PYTHONPATH": str(Path.cwd())}


def manifest(run: Path, round_index: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"rounds/{round_index:04d}/train/manifest.json").read_text())
    return found


def losses(run: Path, round_index: int) -> list[float]:
    lines = (run / f"rounds/{round_index:04d}/train/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_same(run: Path, undisturbed: Path, rounds: Sequence[int] = (0, 1)) -> None:
    """Nothing lost, nothing twice, the same data digest, losses and weights."""
    for round_index in rounds:
        theirs, ours = (DataStore.open(r / "data.zarr").manifest(round_index) for r in (undisturbed, run))
        assert ours is not None
        assert theirs is not None
        assert ours.to_dict() == theirs.to_dict()
        assert losses(run, round_index) == losses(undisturbed, round_index)
        assert manifest(run, round_index)["digests"] == manifest(undisturbed, round_index)["digests"]


def writers(log: Path) -> list[int]:
    """The processes whose standard output is ``log``: a rank, and what it started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(process / "fd" / "1") == str(log):
                found.append(int(process.name))
    return sorted(found)
