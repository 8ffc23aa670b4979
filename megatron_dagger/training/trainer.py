"""Trains one round: from labelled episodes to a checkpoint, metrics.jsonl and, last, manifest.json.

Runs on all ranks alike. A killed round resumes from its newest checkpoint with the same losses as an
uninterrupted one: the rows of a step are a function of the job alone, and a resumed round drops the
metrics that it repeats. On SIGTERM or SIGUSR1 it saves after the step at hand and ends with exit code 75.
"""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_dagger.config import ModelConfig, TrainingConfig, to_dict
from megatron_dagger.signals import STOPPED
from megatron_dagger.store import atomic
from megatron_dagger.training import checkpoint, compat, digests
from megatron_dagger.training.data import packing
from megatron_dagger.training.data.batches import BatchPlan, row_lengths, share_out
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.metrics import Metrics
from megatron_dagger.training.ranks import process_groups as parallel
from megatron_dagger.training.ranks.stop_signal import StopSignal
from megatron_dagger.training.schedule import learning_rate
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.verify.canary import MOST_TOKENS, Canary

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Settings that change no loss.
_NEUTRAL = ("parallel", "checkpoint_interval", "threads_per_process", "deadline_s", "recompute", "recompute_modules")


Episodes = Callable[[], Sequence[LabelledEpisode]]  # reads them


class NoTrainingDataError(ValueError):
    """The episodes have no label to train on."""


def train(job: TrainJob, episodes: Episodes) -> dict[str, Any] | None:
    """Train ``job`` on ``episodes`` (the same on every rank); the manifest on rank 0, None elsewhere.

    They are read and packed while the model is built. Raises ConfigError for settings that cannot work,
    NoTrainingDataError without labels, CheckpointError for an unusable ``init_checkpoint``, SystemExit(STOPPED)
    when a signal asked for it.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(1, thread_name_prefix="data") as thread:
        reading = thread.submit(_read, job, episodes)
        with Trainer(job.model, job.training, seed=job.seed) as trainer:
            return trainer.train_on(job, reading.result, began)


class Trainer:
    """The ranks' process groups, model and optimizer, for one round or for many. A context manager, on all ranks."""

    engine: MegatronEngine
    stop: StopSignal

    def __init__(self, model: ModelConfig, training: TrainingConfig, *, seed: int) -> None:
        self._model, self._training, self._seed = model, training, seed
        self._stack = ExitStack()

    def __enter__(self) -> Trainer:
        training = self._training
        with ExitStack() as stack:
            device = stack.enter_context(
                parallel.process_groups(
                    training.parallel,
                    seed=self._seed,
                    deadline_s=training.deadline_s,
                    threads=training.threads_per_process,
                )
            )
            # Only now: a rank that waits for the others could not answer it.
            self.stop = stack.enter_context(StopSignal())
            self.engine = MegatronEngine(self._model, training, seed=self._seed, device=device)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def train(self, job: TrainJob, episodes: Episodes) -> dict[str, Any] | None:
        """One round, like ``train``; what the round before left in memory is not read again."""
        return self.train_on(job, partial(_read, job, episodes), time.monotonic())

    def train_on(self, job: TrainJob, read: Callable[[], _Reading], began: float) -> dict[str, Any] | None:
        """``train`` on what ``read`` returns, the round having begun at ``began``."""
        waits_since = time.monotonic()
        reading = read()
        waited_s = time.monotonic() - waits_since
        logger.info("%s, waited for %.1f s", reading.text(), waited_s)
        seconds = {"data_s": reading.seconds, "data_wait_s": waited_s}
        return _Round(job, reading.data, self.engine, self.stop, seconds).run(began)


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """What a round is trained on, and the seconds that reading and packing it took."""

    data: packing.PackedDataset
    episodes: int
    seconds: float

    def text(self) -> str:
        return f"{self.episodes} episodes, {self.data.tokens} tokens as packed, read in {self.seconds:.1f} s"


def _read(job: TrainJob, read: Episodes) -> _Reading:
    began, training = time.monotonic(), job.training
    episodes = read()
    data = packing.pack(episodes, training.sequence_length, packing=training.packing)
    if not data.label_tokens:
        raise NoTrainingDataError(
            f"round {job.round_index}: {len(episodes)} episodes with no label within "
            f"training.sequence_length={training.sequence_length} tokens; collect more, or widen the filter"
        )
    return _Reading(data=data, episodes=len(episodes), seconds=time.monotonic() - began)


class _Round:
    def __init__(
        self,
        job: TrainJob,
        data: packing.PackedDataset,
        engine: MegatronEngine,
        stop: StopSignal,
        seconds: Mapping[str, float],
    ) -> None:
        self.job, self.data, self.engine, self.stop, self.seconds = job, data, engine, stop, seconds
        self.output_dir = Path(job.output_dir)
        self.plan = BatchPlan(
            rows=len(data.rows),
            rows_per_step=job.training.micro_batches * job.training.parallel.data_parallel_size,
            epochs=job.training.epochs,
            max_steps=job.training.max_steps,
            seed=job.seed,
            round_index=job.round_index,
        )
        self.costs = row_flops(data, job.model)
        self.fingerprint = fingerprint(job, data)
        self.metrics = Metrics(self.output_dir, self.plan.steps) if parallel.is_rank_zero() else None

    def run(self, began: float) -> dict[str, Any] | None:
        first = self._start()
        if self.metrics is not None:
            self.metrics.begin(first)
        for step in range(first, self.plan.steps):
            self._step(step)
            done = step + 1
            if done == self.plan.steps:
                break
            stop = self.stop.on_any_rank(self.engine.device)
            if stop or done % self.job.training.checkpoint_interval == 0:
                self._save(checkpoint.in_round(self.output_dir, done), done)
            if stop:
                logger.warning("stopped as asked after step %d of %d", done, self.plan.steps)
                raise SystemExit(STOPPED)
        final = self.output_dir / checkpoint.FINAL
        if first < self.plan.steps or not (final / checkpoint.MARKER).is_file():
            self._save(final, self.plan.steps)
        hashes = self._digests()
        canary = self._canary()
        if self.metrics is None:
            return None
        self.metrics.close()
        manifest = self._manifest(hashes, canary, time.monotonic() - began)
        atomic.write_json(self.output_dir / MANIFEST, manifest)
        return manifest

    def _start(self) -> int:
        """Load what the round goes on from; return the number of steps that are done."""
        resumable = checkpoint.find_resumable(self.output_dir, self.fingerprint)
        if resumable is not None:
            directory, state = resumable
            logger.info("resuming after step %d of %d, from %s", state.step, self.plan.steps, directory)
            self.engine.load(directory, with_optimizer=True, exact=True)
            return state.step
        if self.job.init_checkpoint is not None:  # round 0's is of weights alone
            keep_moments = self.job.round_index > 0 and not self.job.training.optimizer.reset_each_round
            before = Path(self.job.init_checkpoint)
            if not (keep_moments and self.engine.holds == before):
                self.engine.load(before, with_optimizer=keep_moments)
        return 0

    def _step(self, step: int) -> None:
        training, began = self.job.training, time.monotonic()
        rows = self.plan.rows_of(step)
        shares = share_out(rows, self.costs, training.parallel.data_parallel_size)
        lengths = [row_lengths(np.where(s >= 0, self.data.row_tokens[s], 0), training) for s in shares]
        rank = parallel_state.get_data_parallel_rank()
        real = rows[rows >= 0]
        rate = learning_rate(step, self.plan.steps, training.optimizer)
        result = self.engine.step(
            [self.data.row(int(index), length) for index, length in zip(shares[rank], lengths[rank], strict=True)],
            normaliser=float(self.data.row_weights[real].sum()),
            learning_rate=rate,
        )
        if self.metrics is not None:
            self.metrics.add(
                step=step + 1,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=rate,
                label_tokens=int(self.data.row_label_tokens[real].sum()),
                tokens=int(self.data.row_tokens[real].sum()),
                places=sum(map(sum, lengths)),
                step_s=time.monotonic() - began,
            )

    def _save(self, directory: Path, step: int) -> None:
        state = checkpoint.CheckpointState(
            step=step,
            round_index=self.job.round_index,
            seed=self.job.seed,
            weight_version=self.job.weight_version,
            fingerprint=self.fingerprint,
            model=self.job.model,
            megatron_core=compat.version(),
        )
        self.engine.save(directory, state)
        checkpoint.remove_others(self.output_dir, keep=directory)

    def _digests(self) -> dict[str, str]:
        """Of what the engine will hold; on all ranks together."""
        chunks, model = self.engine.chunks, self.job.model
        quantises = self.job.quantization == "fp8"
        scales = digests.block_scales(chunks, model, self.engine.device) if quantises else None
        return digests.parameter_digests(chunks, model, scales)

    def _canary(self) -> Canary:
        """The first tokens of the data, and the log-probs of the weights in memory for them; on all ranks together."""
        tokens = self.data.samples[0].trunk[:MOST_TOKENS]
        episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=1, tokens=tokens[1:]),))
        row = packing.pack([episode], self.job.training.sequence_length).row(0)
        stages = self.job.training.parallel.pipeline_model_parallel_size
        computed = self.engine.logprobs([row] * stages)  # the interleaved schedule wants as many micro-batches
        all_tasks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(all_tasks, computed and computed[0][: len(tokens) - 1].tolist())
        logprobs = next(values for values in all_tasks if values is not None)
        return Canary(tokens=tuple(tokens.tolist()), logprobs=tuple(logprobs))

    def _manifest(self, hashes: dict[str, str], canary: Canary, duration_s: float) -> dict[str, Any]:
        assert self.metrics is not None
        return {
            "round": self.job.round_index,
            **self.metrics.summary(),
            "samples": len(self.data.samples),
            "rows": len(self.data.rows),
            "too_long": self.data.too_long,
            "cut": self.data.cut,
            "duration_s": duration_s,
            **self.seconds,
            "peak_memory_mib": peak_memory_mib(),
            "checkpoint": checkpoint.FINAL,
            "weight_version": self.job.weight_version,
            "digests": hashes,
            "canary": to_dict(canary),
        }


def peak_memory_mib() -> float:
    """The most memory that this rank had: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fingerprint(job: TrainJob, data: packing.PackedDataset) -> str:
    """A hash of what a round's losses depend on: settings and data, but not the parallel layout."""
    hasher = hashlib.sha256()
    neutral = replace(job, output_dir="", weight_version=0, quantization="none")
    if job.round_index:  # it goes on from the round before, however the run directory is spelled
        neutral = replace(neutral, init_checkpoint=None)
    settings = to_dict(neutral)
    for name in _NEUTRAL:
        del settings["training"][name]
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    for sample in data.samples:
        hasher.update(f"{len(sample.trunk)} {sample.spans}".encode() + sample.trunk.tobytes())
        for branch in sample.branches:
            hasher.update(f"{branch.position} {len(branch.tokens)} {branch.weight}".encode() + branch.tokens.tobytes())
    return hasher.hexdigest()
