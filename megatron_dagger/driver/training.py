"""What the command ``train`` does: on a node, which starts ranks, and in each of these."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config import RunConfig
from megatron_dagger.dagger.context import round_dir, train_dir, train_manifest
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.status_file import failure_recorded
from megatron_dagger.store.atomic import check_room
from megatron_dagger.store.fence import VARIABLE, claim, inherit
from megatron_dagger.types import LabelledEpisode

if TYPE_CHECKING:
    from megatron_dagger.training.job import TrainJob

logger = logging.getLogger(__name__)

RESIDENT = "trainer"  # the name under which a trainer that lives through all rounds works on a run


def train_job(config: RunConfig, run_dir: Path, round_index: int) -> TrainJob:
    """What the ranks of a round's training are told."""
    from megatron_dagger.training.job import TrainJob

    previous = train_dir(run_dir, round_index - 1) / "checkpoint"
    return TrainJob(
        round_index=round_index,
        seed=config.seed,
        model=config.model,
        training=config.training,
        output_dir=str(train_dir(run_dir, round_index)),
        init_checkpoint=str(previous) if round_index else config.init_checkpoint,
        weight_version=round_index,
        quantization=config.rollout.engine.quantization,
    )


def train_with_progress(
    config: RunConfig, run_dir: Path, tracked: Callable[..., Any], env: Mapping[str, str], round_index: int
) -> None:
    """A round's training by the run's holder, who tells of its progress and failure."""
    with told(tracked, run_dir, round_index, train_logs(run_dir, round_index)):
        launch_training(config, run_dir, round_index, env=env)


def told(tracked: Callable[..., Any], run_dir: Path, round_index: int, log_file: Path) -> AbstractContextManager[Any]:
    """While a round is trained in the block, its steps are counted and told."""

    def steps() -> int:
        return len(read_lines(train_dir(run_dir, round_index) / "metrics.jsonl"))

    return tracked(  # type: ignore[no-any-return]
        f"round {round_index} train",
        None,
        unit="steps",
        done=steps(),
        count=steps,
        round_index=round_index,
        stage="train",
        log_file=log_file,
    )


def train_logs(run_dir: Path, round_index: int | None = None) -> Path:
    """Where the ranks' logs are, of a round's training or of one that lives through all rounds."""
    return run_dir / "logs" / ("train" if round_index is None else f"train-{round_index:04d}")


def launch_training(
    config: RunConfig, run_dir: Path, round_index: int, *, env: Mapping[str, str] | None = None
) -> None:
    """Start the ranks of a round's training on this host and wait for them."""
    logger.info("round %d train: %d ranks", round_index, config.training.parallel.world_size)
    words, logs = ("--round", str(round_index)), train_logs(run_dir, round_index)
    _launch(config, run_dir, words, logs, config.training.deadline_s, env)


def _launch(
    config: RunConfig,
    run_dir: Path,
    words: Sequence[str],
    log_dir: Path,
    deadline_s: float,
    env: Mapping[str, str] | None,
) -> None:
    """Start this host's ranks, each of which does ``train`` with ``words``, and wait for them."""
    from megatron_dagger.training.ranks.launch import launch

    command = ["megatron_dagger.cli.main", "train", str(run_dir), *words, "--rank"]
    threads = config.training.threads_per_process
    try:
        launch(command, config.training.parallel, log_dir, deadline_s, threads=threads, env=env)
    except RuntimeError:
        check_room(run_dir)  # torch's writer does not say that the disk is full, and the ranks' logs may be cut
        raise


def train_resident(config: RunConfig, run_dir: Path, *, take_over: bool = False) -> None:
    """Start the ranks on this host that train all rounds, and wait for them.

    The first node claims the run as a worker of its own, which keeps a second trainer out.
    """
    from megatron_dagger.training.ranks.launch import node_rank

    with ExitStack() as stack:
        env = None
        if node_rank(config.training.parallel) == 0:
            env = {VARIABLE: stack.enter_context(claim(run_dir, worker=RESIDENT, take_over=take_over))}
            stack.enter_context(failure_recorded(run_dir, worker=RESIDENT, log_file=train_logs(run_dir)))
        deadline_s = (config.training.deadline_s + config.rollout.stage_deadline_s) * (config.dagger.rounds + 2)
        _launch(config, run_dir, ("--resident",), train_logs(run_dir), deadline_s, env)


def train_beside(config: RunConfig, run_dir: Path, round_index: int) -> None:
    """A further node's part in a round's training: its ranks. The first node holds the run and writes."""
    if not train_manifest(run_dir, round_index).exists():
        launch_training(config, run_dir, round_index)


def train_rank(config: RunConfig, run_dir: Path, round_index: int) -> None:
    """One rank of a round's training."""
    from megatron_dagger.training import compat
    from megatron_dagger.training.trainer import train

    compat.quiet()
    inherit(run_dir, os.environ)
    episodes = functools.partial(training_data, config, run_dir, round_index)
    train(train_job(config, run_dir, round_index), episodes)


def train_resident_rank(config: RunConfig, run_dir: Path) -> None:
    """One rank of a trainer that lives through all rounds."""
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.training import compat
    from megatron_dagger.training.resident import ResidentRounds, train_rounds

    compat.quiet()
    inherit(run_dir, os.environ)

    def collected(index: int) -> bool:
        store = run_dir / "data.zarr"
        return (store / "zarr.json").exists() and DataStore.open(store).manifest(index) is not None

    tracked = functools.partial(track, run_dir=run_dir, worker=RESIDENT)
    rounds = ResidentRounds(
        run_dir=run_dir,
        rounds=config.dagger.rounds + 1,
        engine=config.rollout.engine,
        job=functools.partial(train_job, config, run_dir),
        collected=collected,
        episodes=functools.partial(training_data, config, run_dir),
        told=lambda index: told(tracked, run_dir, index, train_logs(run_dir)),
        over=(round_dir(run_dir, config.dagger.rounds) / "evaluate.json").exists,
        deadline_s=config.rollout.stage_deadline_s,
    )
    train_rounds(rounds)


def training_data(config: RunConfig, run_dir: Path, round_index: int) -> list[LabelledEpisode]:
    """What a round trains on: the labels of the rounds that ``dagger.aggregation`` selects."""
    from megatron_dagger.dagger.aggregation import aggregate, select_rounds
    from megatron_dagger.store.aggregated import DataStore

    store = DataStore.open(run_dir / "data.zarr")
    chosen = select_rounds(config.dagger.aggregation, round_index, store.sealed())
    return aggregate((e for index in chosen for e in store.episodes(index)), config.dagger.aggregation)
