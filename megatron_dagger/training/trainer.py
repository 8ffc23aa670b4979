"""Trains rounds: from labelled episodes to a checkpoint, metrics.jsonl and, last, manifest.json.

Runs on all ranks alike. ``train_round`` trains one round in a process of its own; a ``Trainer`` keeps model and
optimizer in memory and trains one round after the other. Both write the same.
"""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.gpus import check_torch
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.ranks.process_groups import process_groups
from megatron_dagger.training.ranks.stop_signal import StopSignal
from megatron_dagger.training.round_data import ReadEpisodes, RoundData, load_round_data
from megatron_dagger.training.training_round import TrainingRound

logger = logging.getLogger(__name__)


def train_round(job: TrainJob, read_episodes: ReadEpisodes) -> dict[str, Any] | None:
    """Train ``job`` on the episodes (the same on every rank); return the manifest on rank 0, None elsewhere.

    Reads and packs the episodes in a thread while the model is built. Raises ConfigError for settings that cannot
    work, NoTrainingDataError without labels, CheckpointError for an unusable ``init_checkpoint``, and
    SystemExit(STOPPED) if a signal asked this or another rank to stop.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        loading = thread.submit(load_round_data, job, read_episodes)
        with Trainer(job.model, job.training, seed=job.seed, random_weights=job.init_checkpoint is None) as trainer:
            ready_s = time.monotonic()
            data = loading.result()
            return trainer.train(job, data, data_wait_s=time.monotonic() - ready_s)


class Trainer:
    """The ranks' process groups, model and optimizer, for any number of rounds. A context manager, on all ranks."""

    engine: MegatronEngine
    stop: StopSignal

    def __init__(self, model: ModelConfig, training: TrainingConfig, *, seed: int, random_weights: bool = True) -> None:
        """``random_weights=False``: a checkpoint is loaded before the first step."""
        self._model, self._training, self._seed, self._random_weights = model, training, seed, random_weights
        self._stack = ExitStack()

    def __enter__(self) -> Trainer:
        training = self._training
        check_torch(torch, os.environ, needed=training.precision != "fp32")
        with ExitStack() as stack:
            device = stack.enter_context(
                process_groups(
                    training.parallel,
                    seed=self._seed,
                    timeout_s=training.collective_timeout_s,
                    threads=training.threads_per_process,
                )
            )
            # Not earlier: a rank that waits for the others to join could not answer a signal that is only remembered.
            self.stop = stack.enter_context(StopSignal())
            self.engine = MegatronEngine(
                self._model, training, seed=self._seed, device=device, random_weights=self._random_weights
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def train(self, job: TrainJob, data: RoundData, *, data_wait_s: float) -> dict[str, Any] | None:
        """Train one round on ``data``; return the manifest on rank 0, None elsewhere.

        Weights and moments that the previous round left in memory are not read again. ``data_wait_s`` is the time
        that the ranks were idle until the data were loaded, for the manifest. Raises as ``train_round``.
        """
        logger.info(
            "%d episodes, %d tokens as packed, read in %.1f s, waited for %.1f s",
            data.episodes,
            data.packed.tokens,
            data.load_s,
            data_wait_s,
        )
        timings = {"data_s": data.load_s, "data_wait_s": data_wait_s}
        return TrainingRound(job, data.packed, self.engine, self.stop).run(began_s=data.began_s, timings=timings)
