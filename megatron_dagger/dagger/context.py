"""What a run needs from the context: tasks, policies, training. The loop knows no more of it than this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor as ThreadPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_dagger.config import RunConfig, SamplingConfig
from megatron_dagger.envs.base import Env
from megatron_dagger.policies.base import Policy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.types import Trajectory
from megatron_dagger.weights.verify.canary import Canary


class Student(Protocol):
    """The student as the rollout workers serve it: new weights are taken over in place."""

    def with_sampling(self, sampling: SamplingConfig) -> Policy:
        """The policy that samples so, from the weights served last."""
        ...

    def sync(self, weights: Path, version: int, digests: Mapping[str, str], canary: Canary | None = None) -> Any:
        """Serve the weights of a checkpoint; raises where what arrived is not what was trained."""
        ...


class EpisodeStore(Protocol):
    """The committed episodes of a run; see store.DataStore."""

    def append(self, trajectories: Any) -> Any: ...
    def committed(self, round_index: int) -> set[tuple[str, int]]: ...
    def given_up(self, round_index: int) -> Any: ...
    def seal(self, round_index: int) -> Any: ...
    def manifest(self, round_index: int) -> Any: ...
    def episodes(self, round_index: int) -> Any: ...
    def rounds(self) -> list[int]: ...


class MetricsSink(Protocol):
    """Takes the numbers of a finished stage; see observability.Metrics."""

    def record(self, round_index: int, stage: str, values: dict[str, Any], *, steps: Any = ()) -> bool: ...


Score = Callable[[Trajectory], Awaitable[Trajectory]]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The parts that a run is put together from; the command line makes it (cli/context.py)."""

    config: RunConfig
    run_dir: Path
    renderer: ChatRenderer
    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...]
    make_env: Callable[[str], Env]  # by task id
    prefetch: Callable[[Sequence[str]], None]  # of task ids: what their episodes will need, in the background
    teacher: Policy
    score: Score | None  # adds what the teacher thinks of the student's tokens to a collected episode
    student: Callable[[], Student]  # gets ready in the background from the first call on
    data: EpisodeStore
    evaluations: EpisodeStore
    metrics: MetricsSink
    train: Callable[[int], None]  # trains a round to its manifest
    track: Callable[..., Any]  # observability.progress.track
    threads: ThreadPool

    def round_dir(self, round_index: int) -> Path:
        return round_dir(self.run_dir, round_index)


def round_dir(run_dir: Path, round_index: int) -> Path:
    """Where a round's stages write: collect.json, train/, evaluate.json."""
    return run_dir / "rounds" / f"{round_index:04d}"


def train_dir(run_dir: Path, round_index: int) -> Path:
    """Where a round's training writes its checkpoint, the steps' metrics.jsonl and, last, its manifest."""
    return round_dir(run_dir, round_index) / "train"


def train_manifest(run_dir: Path, round_index: int) -> Path:
    """What a round's training says of itself: a round is trained once this is there."""
    return train_dir(run_dir, round_index) / "manifest.json"
