"""The resident trainer: it waits for a round's episodes, trains, and sends the weights to rollout workers.

Resident means disaggregated: the trainer and the rollout workers stay alive on GPUs of their own through all rounds.
While the trainer waits, weights and moments stay in memory, and engines that ask get the weights
(``weights.weight_server``). It writes the same files as the trainings of single rounds: a run may be continued either
way. Runs on all ranks alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.signals import STOPPED
from megatron_dagger.training.job import MANIFEST, TrainJob
from megatron_dagger.training.ranks.process_groups import is_rank_zero
from megatron_dagger.training.round_data import load_round_data
from megatron_dagger.training.trainer import Trainer
from megatron_dagger.training.weight_export import send_to_engine
from megatron_dagger.types import LabelledEpisode
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.shared_memory import this_host
from megatron_dagger.weights.weight_server import WeightServer

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_CONDITION_MET = "condition met"  # rank 0's decision: end the wait; else serve a WeightSource, or None: keep waiting


@dataclass(frozen=True, kw_only=True)
class ResidentRun:
    """The run of a resident trainer. The callables read files; rank 0 calls those that decide for all ranks."""

    run_dir: Path
    num_rounds: int
    rollout_engine: VllmEngineConfig  # of the workers that take the weights
    job: Callable[[int], TrainJob]  # of a round
    is_collected: Callable[[int], bool]  # whether all episodes of a round are there
    read_episodes: Callable[[int], Sequence[LabelledEpisode]]  # a round's training data
    report_progress: Callable[[int], AbstractContextManager[Any]]  # entered on rank 0 while a round is trained
    is_over: Callable[[], bool]  # whether no worker will need weights any more
    deadline_s: float  # for the collection of a round


def train_rounds(run: ResidentRun) -> None:
    """Train every untrained round as soon as it is collected; return when the run is over.

    Raises what ``trainer.train_round`` raises, TimeoutError if a round is not collected within ``deadline_s``, and
    SystemExit(STOPPED) if a signal asked this or another rank to stop.
    """
    job = run.job(0)
    with Trainer(job.model, job.training, seed=job.seed, random_weights=job.init_checkpoint is None) as trainer:
        _ResidentTrainer(run, trainer, SourceLayout.of_trainer(job.model, job.training.parallel)).train_rounds()


class _ResidentTrainer:
    def __init__(self, run: ResidentRun, trainer: Trainer, layout: SourceLayout) -> None:
        self.run, self.trainer = run, trainer
        self.target = TargetLayout(tensor_parallel_size=run.rollout_engine.tensor_parallel_size)
        hosts = [""] * torch.distributed.get_world_size()
        # GPUs use NCCL: the transport by CUDA IPC exists, but was never tried where each process sees its own GPUs
        # only, as on a cluster.
        use_shared_memory = trainer.engine.device.type == "cpu"
        torch.distributed.all_gather_object(hosts, this_host() if use_shared_memory else "")
        self.server = WeightServer(run.run_dir, layout, hosts) if is_rank_zero() else None
        self.version: int | None = None  # of the weights in memory

    def train_rounds(self) -> None:
        for index in range(self._first_untrained(), self.run.num_rounds):
            self._serve_until(partial(self.run.is_collected, index), f"the episodes of round {index}")
            with self.run.report_progress(index) if is_rank_zero() else nullcontext():
                job = self.run.job(index)
                data = load_round_data(job, partial(self.run.read_episodes, index))
                self.trainer.train(job, data, data_wait_s=data.load_s)
            self.version = index
        self._serve_until(self.run.is_over, "the last evaluation")

    def _first_untrained(self) -> int:
        """Return the first round without a manifest, as rank 0 sees it, on every rank."""
        jobs = map(self.run.job, range(self.run.num_rounds))
        trained = [(Path(job.output_dir) / MANIFEST).exists() for job in jobs]
        first = [trained.index(False) if False in trained else self.run.num_rounds]
        torch.distributed.broadcast_object_list(first, src=0)
        return first[0]

    def _serve_until(self, condition: Callable[[], bool], awaited: str) -> None:
        """Send the weights in memory to engines that ask for them, until ``condition`` holds."""
        deadline = time.monotonic() + self.run.deadline_s
        with self.server.serving(self.version) if self.server and self.version is not None else nullcontext():
            while True:
                decision = [_decide(self.server, condition)] if self.server else [None]
                torch.distributed.broadcast_object_list(decision, src=0)
                if self.trainer.stop.on_any_rank(self.trainer.engine.device):
                    logger.warning("stopped by a signal while waiting for %s", awaited)
                    raise SystemExit(STOPPED)
                if decision[0] == _CONDITION_MET:
                    return
                if isinstance(decision[0], WeightSource):
                    self._send(decision[0])
                elif time.monotonic() > deadline:
                    raise TimeoutError(f"{awaited}: not there after {self.run.deadline_s:.0f} s")
                else:
                    time.sleep(_POLL_S)

    def _send(self, source: WeightSource) -> None:
        engine = self.run.rollout_engine
        try:
            send_to_engine(self.trainer.engine, source, self.target, engine.dtype, engine.quantization)
        except WeightSyncError as error:  # the rollout engine falls back on the checkpoint
            logger.warning("a rollout engine did not take the weights: %s", error)
        else:
            logger.info("a rollout engine took weights %s (%s)", self.version, source.kind)


def _decide(server: WeightServer, condition: Callable[[], bool]) -> WeightSource | str | None:
    return server.next_source() or (_CONDITION_MET if condition() else None)
