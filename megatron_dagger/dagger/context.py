"""RunContext: the parts a run is made of (tasks, policies, stores, the trainer). The loop depends on nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dagger.config import RunConfig, SamplingConfig
from megatron_dagger.envs.base import Env
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.types import Trajectory
from megatron_dagger.weights.verify.canary import Canary

if TYPE_CHECKING:
    from megatron_dagger.observability.metrics import StageMetrics
    from megatron_dagger.observability.progress import Tracker
    from megatron_dagger.store.aggregated import DataStore

Score = Callable[[Trajectory], Awaitable[Trajectory]]


class Student(Protocol):
    """The student, served by a rollout worker. New weights replace the old weights in place."""

    def with_sampling(self, sampling: SamplingConfig) -> Policy:
        """Return a policy that samples with these parameters from the weights that are served."""
        ...

    def sync(self, checkpoint: Path, version: int, digests: Mapping[str, str], canary: Canary | None = None) -> object:
        """Serve a checkpoint's weights as ``version``. Raises WeightSyncError unless they equal the trained ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything the rounds of a run need; ``driver.context`` opens it."""

    config: RunConfig
    run_dir: Path
    renderer: ChatRenderer
    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...]
    make_env: Callable[[str], Env]  # by task id
    prefetch: Callable[[Sequence[str]], None]  # fetches images and files of these tasks in the background
    teacher: Policy
    score: Score | None  # adds the teacher's log-probs of the student's tokens to a collected episode
    student: Callable[[], Student]  # the first call starts the engine in the background and returns at once
    data: DataStore
    evaluations: DataStore
    references: DataStore  # the teacher alone on the held-out tasks, in round 0
    takeovers: DataStore  # held-out tasks that the student began and the teacher finished, by evaluated round
    metrics: StageMetrics
    train: Callable[[int], None]  # trains a round and writes its manifest
    track: Callable[..., AbstractContextManager[Tracker]]  # observability.progress.track
    threads: futures.Executor  # blocking environments run here

    def start_student(self) -> None:
        """Start the student's engine in the background, for example while the trainer works."""
        self.student()

    def round_dir(self, round_index: int) -> Path:
        return round_dir(self.run_dir, round_index)


def round_dir(run_dir: Path, round_index: int) -> Path:
    """Return the directory of a round: collect.json, train/, evaluate.json."""
    return run_dir / "rounds" / f"{round_index:04d}"


def train_dir(run_dir: Path, round_index: int) -> Path:
    """Return the directory of a round's training: its checkpoint, the steps' metrics.jsonl and its manifest."""
    return round_dir(run_dir, round_index) / "train"


def train_manifest(run_dir: Path, round_index: int) -> Path:
    """Return the file that ends a round's training: a round is trained if and only if it exists."""
    return train_dir(run_dir, round_index) / "manifest.json"
