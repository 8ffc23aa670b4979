"""A trainer that lives through all rounds of a run: it waits for a round's episodes, trains, and hands over.

Runs on all ranks alike. While it waits, weights and moments stay in memory, and engines are given the weights
that ask for them (``weights.desk``). What it writes is what the trainings of single rounds write, so a run may
go on in either way.
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
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.ranks import process_groups as parallel
from megatron_dagger.training.trainer import MANIFEST, Trainer
from megatron_dagger.training.weight_export import send_to_engine
from megatron_dagger.types import LabelledEpisode
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.shared_memory import this_host
from megatron_dagger.weights.weight_server import WeightServer

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_ON = "on"  # what rank 0 tells the others: go on, serve this WeightSource, or (None) wait


@dataclass(frozen=True, kw_only=True)
class ResidentRounds:
    """What a resident trainer asks about its run; the answers come from files, on rank 0 where it decides."""

    run_dir: Path
    rounds: int
    engine: VllmEngineConfig  # of those who take the weights
    job: Callable[[int], TrainJob]
    collected: Callable[[int], bool]  # whether a round's episodes are all there
    episodes: Callable[[int], Sequence[LabelledEpisode]]
    told: Callable[[int], AbstractContextManager[Any]]  # rank 0 tells of a round's training within it
    over: Callable[[], bool]  # whether nobody will want weights any more
    deadline_s: float  # for a round's collection


def train_rounds(rounds: ResidentRounds) -> None:
    """Train every round that has not been trained, as soon as it is collected; return when the run is over.

    Raises what ``trainer.train`` raises, TimeoutError where a round is not collected within ``deadline_s``, and
    SystemExit(STOPPED) when a signal asked for it.
    """
    job = rounds.job(0)
    with Trainer(job.model, job.training, seed=job.seed) as trainer:
        _Resident(rounds, trainer, SourceLayout.of_trainer(job.model, job.training.parallel)).run()


class _Resident:
    def __init__(self, rounds: ResidentRounds, trainer: Trainer, source: SourceLayout) -> None:
        self.rounds, self.trainer = rounds, trainer
        self.target = TargetLayout(tensor_parallel_size=rounds.engine.tensor_parallel_size)
        hosts = [""] * torch.distributed.get_world_size()
        # Between GPUs the network (NCCL): CUDA IPC is written, and has not been tried yet where each process sees
        # its own GPUs only, as on a cluster.
        shares = trainer.engine.device.type == "cpu"
        torch.distributed.all_gather_object(hosts, this_host() if shares else "")
        self.desk = WeightServer(rounds.run_dir, source, hosts) if parallel.is_rank_zero() else None
        self.version: int | None = None  # of the weights in memory

    def run(self) -> None:
        for index in range(self._first(), self.rounds.rounds):
            self._serve_until(partial(self.rounds.collected, index), f"the episodes of round {index}")
            with self.rounds.told(index) if self.desk is not None else nullcontext():
                self.trainer.train(self.rounds.job(index), partial(self.rounds.episodes, index))
            self.version = index
        self._serve_until(self.rounds.over, "the last evaluation")

    def _first(self) -> int:
        """The first round that is not trained; on every rank what rank 0 sees."""
        jobs = map(self.rounds.job, range(self.rounds.rounds))
        trained = [(Path(job.output_dir) / MANIFEST).exists() for job in jobs]
        first = [trained.index(False) if False in trained else self.rounds.rounds]
        torch.distributed.broadcast_object_list(first, src=0)
        return first[0]

    def _serve_until(self, condition: Callable[[], bool], what: str) -> None:
        """Give the weights in memory to engines that ask, until the condition holds."""
        deadline = time.monotonic() + self.rounds.deadline_s
        with self.desk.serving(self.version) if self.desk and self.version is not None else nullcontext():
            while True:
                told = [self._decide(condition)] if self.desk else [None]
                torch.distributed.broadcast_object_list(told, src=0)
                if self.trainer.stop.on_any_rank(self.trainer.engine.device):
                    logger.warning("stopped as asked while waiting for %s", what)
                    raise SystemExit(STOPPED)
                if told[0] == _ON:
                    return
                if isinstance(told[0], WeightSource):
                    self._send_to_engine(told[0])
                elif time.monotonic() > deadline:
                    raise TimeoutError(f"{what}: not there after {self.rounds.deadline_s:.0f} s")
                else:
                    time.sleep(_POLL_S)

    def _decide(self, condition: Callable[[], bool]) -> WeightSource | str | None:
        assert self.desk is not None
        return self.desk.next_offer() or (_ON if condition() else None)

    def _send_to_engine(self, offer: WeightSource) -> None:
        engine = self.rounds.engine
        try:
            send_to_engine(self.trainer.engine, offer, self.target, engine.dtype, engine.quantization)
        except WeightSyncError as error:  # the engine has the checkpoint to fall back on
            logger.warning("an engine did not take the weights: %s", error)
        else:
            logger.info("an engine took weights %s (%s)", self.version, offer.kind)
