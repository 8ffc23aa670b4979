"""Train the rounds of a run: start the ranks on a node, and run one rank in a process."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.config import RunConfig
from megatron_dagger.dagger.context import round_dir, train_dir, train_manifest
from megatron_dagger.driver.run_dir import COLLECTED
from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.observability.progress import Tracker, track
from megatron_dagger.observability.status_file import RunProcess, failure_recorded
from megatron_dagger.store.atomic import check_disk_space
from megatron_dagger.store.fence import VARIABLE, claim, inherit
from megatron_dagger.types import LabelledEpisode

if TYPE_CHECKING:
    from megatron_dagger.training.job import TrainJob

logger = logging.getLogger(__name__)

RESIDENT = "trainer"  # the name under which a resident trainer claims a run


def train_job(config: RunConfig, run_dir: Path, round_index: int) -> TrainJob:
    """Return the job of the ranks that train a round."""
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


def train_with_progress(config: RunConfig, process: RunProcess, env: Mapping[str, str], round_index: int) -> None:
    """Train a round as the process that holds the run; show the progress and write it to the status file."""
    process = replace(process, log_file=train_logs(process.run_dir, round_index))
    with report_progress(process, round_index):
        launch_training(config, process.run_dir, round_index, env=env)


def report_progress(process: RunProcess, round_index: int) -> AbstractContextManager[Tracker]:
    """Return a context manager: while the block trains a round, show its steps and write them to the status file."""

    def steps() -> int:
        return len(read_lines(train_dir(process.run_dir, round_index) / "metrics.jsonl"))

    return track(
        f"round {round_index} train",
        None,
        unit="steps",
        done=steps(),
        count=steps,
        process=process,
        stage=(round_index, "train"),
    )


def train_logs(run_dir: Path, round_index: int | None = None) -> Path:
    """Return the folder of the ranks' logs, of one round's training or of the resident trainer."""
    return run_dir / "logs" / ("train" if round_index is None else f"train-{round_index:04d}")


def launch_training(
    config: RunConfig, run_dir: Path, round_index: int, *, env: Mapping[str, str] | None = None
) -> None:
    """Start the ranks of a round's training on this node, and wait for them."""
    logger.info("round %d train: %d ranks", round_index, config.training.parallel.world_size)
    argv, logs = ("--round", str(round_index)), train_logs(run_dir, round_index)
    _launch(config, run_dir, argv, logs, config.training.deadline_s, env)


def _launch(
    config: RunConfig,
    run_dir: Path,
    argv: Sequence[str],
    log_dir: Path,
    deadline_s: float,
    env: Mapping[str, str] | None,
) -> None:
    """Start this node's ranks, each running the command ``train`` with ``argv``, and wait for them."""
    from megatron_dagger.training.ranks.launch import launch

    command = ["megatron_dagger.cli.main", "train", str(run_dir), *argv, "--rank"]
    threads = config.training.threads_per_process
    try:
        launch(command, config.training.parallel, log_dir, deadline_s, threads=threads, env=env)
    except RuntimeError:
        # torch's writer does not say that the disk is full, and the ranks' logs may be cut off.
        check_disk_space(run_dir)
        raise


def train_resident(config: RunConfig, run_dir: Path, *, take_over: bool = False) -> None:
    """Start the ranks of the resident trainer on this node, and wait for them.

    The first node claims the run under the name RESIDENT, which keeps a second trainer out.
    """
    from megatron_dagger.training.ranks.launch import node_rank

    with ExitStack() as stack:
        env = None
        if node_rank(config.training.parallel) == 0:
            env = {VARIABLE: stack.enter_context(claim(run_dir, worker=RESIDENT, take_over=take_over))}
            stack.enter_context(failure_recorded(_resident_process(run_dir)))
        deadline_s = (config.training.deadline_s + config.rollout.stage_deadline_s) * (config.dagger.rounds + 2)
        _launch(config, run_dir, ("--resident",), train_logs(run_dir), deadline_s, env)


def _resident_process(run_dir: Path) -> RunProcess:
    return RunProcess(run_dir=run_dir, worker=RESIDENT, log_file=train_logs(run_dir))


def train_on_further_node(config: RunConfig, run_dir: Path, round_index: int) -> None:
    """Start the ranks of a node other than the first, unless the round is trained. The first node holds the run."""
    if not train_manifest(run_dir, round_index).exists():
        launch_training(config, run_dir, round_index)


def train_rank(config: RunConfig, run_dir: Path, round_index: int) -> None:
    """Run one rank of a round's training in this process."""
    from megatron_dagger.training import compat
    from megatron_dagger.training.trainer import train_round

    compat.quiet()
    inherit(run_dir, os.environ)
    episodes = functools.partial(training_data, config, run_dir, round_index)
    train_round(train_job(config, run_dir, round_index), episodes)


def train_resident_rank(config: RunConfig, run_dir: Path) -> None:
    """Run one rank of the resident trainer in this process."""
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.training import compat
    from megatron_dagger.training.resident import ResidentRun, train_rounds

    compat.quiet()
    inherit(run_dir, os.environ)

    def collected(index: int) -> bool:
        store = run_dir / COLLECTED
        return (store / "zarr.json").exists() and DataStore.open(store).manifest(index) is not None

    run = ResidentRun(
        run_dir=run_dir,
        num_rounds=config.dagger.rounds + 1,
        rollout_engine=config.rollout.engine,
        job=functools.partial(train_job, config, run_dir),
        is_collected=collected,
        read_episodes=functools.partial(training_data, config, run_dir),
        report_progress=functools.partial(report_progress, _resident_process(run_dir)),
        is_over=(round_dir(run_dir, config.dagger.rounds) / "evaluate.json").exists,
        deadline_s=config.rollout.stage_deadline_s,
    )
    train_rounds(run)


def training_data(config: RunConfig, run_dir: Path, round_index: int) -> list[LabelledEpisode]:
    """Return a round's training data: the labels of the rounds that ``dagger.aggregation`` selects."""
    from megatron_dagger.dagger.aggregation import aggregate, select_rounds
    from megatron_dagger.store.aggregated import DataStore

    store = DataStore.open(run_dir / COLLECTED)
    chosen = select_rounds(config.dagger.aggregation, round_index, store.sealed())
    return aggregate((e for index in chosen for e in store.episodes(index)), config.dagger.aggregation)
