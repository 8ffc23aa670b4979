"""One round on an engine that is ready: resume or begin, step, save, digest, and write the manifest.

A killed round resumes from its newest checkpoint with the same losses as an uninterrupted one: the rows of a step are
a function of the job alone, and a resumed round drops the metrics of the steps that it repeats. On SIGTERM or SIGUSR1
it saves after the current step and raises SystemExit(STOPPED).
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core import parallel_state

from megatron_dagger.config import to_dict
from megatron_dagger.signals import STOPPED
from megatron_dagger.store import atomic
from megatron_dagger.training import checkpoint, compat, digests
from megatron_dagger.training.data.batches import BatchPlan, distribute_rows, fill_up, row_lengths
from megatron_dagger.training.data.flops import row_flops
from megatron_dagger.training.data.packing import PackedDataset, pack
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.fingerprint import fingerprint
from megatron_dagger.training.job import MANIFEST, TrainJob
from megatron_dagger.training.metrics import StepMetrics
from megatron_dagger.training.ranks.process_groups import is_rank_zero
from megatron_dagger.training.ranks.stop_signal import StopSignal
from megatron_dagger.training.schedule import learning_rate
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.verify.canary import MAX_TOKENS, Canary

logger = logging.getLogger(__name__)


class TrainingRound:
    """One round's steps, on all ranks alike; rank 0 writes."""

    def __init__(self, job: TrainJob, data: PackedDataset, engine: MegatronEngine, stop: StopSignal) -> None:
        self.job, self.data, self.engine, self.stop = job, data, engine, stop
        self.output_dir = Path(job.output_dir)
        self.plan = BatchPlan(
            groups=len(data.groups),
            groups_per_step=job.training.micro_batches * job.training.parallel.data_parallel_size,
            epochs=job.training.epochs,
            max_steps=job.training.steps_limit(job.round_index),
            seed=job.seed,
            round_index=job.round_index,
        )
        self.costs = row_flops(data, job.model)
        self.fingerprint = fingerprint(job, data)

    def run(self, *, began_s: float, timings: Mapping[str, float]) -> dict[str, Any] | None:
        """Train the round; return the manifest on rank 0, None elsewhere.

        ``began_s`` is the round's start on the monotonic clock; ``timings`` are seconds to put into the manifest.
        """
        first = self._load_start()
        metrics = StepMetrics(self.output_dir, self.plan.steps, finished=first) if is_rank_zero() else None
        with closing(metrics) if metrics else nullcontext():
            self._train(first, metrics)
        final = self.output_dir / checkpoint.FINAL
        if first < self.plan.steps or not (final / checkpoint.MARKER).is_file():
            self._save(final, self.plan.steps)
        hashes = self._digests()
        canary = self._canary()
        if metrics is None:
            return None
        manifest = {
            "round": self.job.round_index,
            **metrics.summary(),
            "labels": self.data.labels,
            "samples": len(self.data.samples),
            "rows": len(self.data.rows),
            "too_long": self.data.too_long,
            "cut": self.data.cut,
            "duration_s": time.monotonic() - began_s,
            **timings,
            "peak_memory_mib": peak_memory_mib(),
            "checkpoint": checkpoint.FINAL,
            "weight_version": self.job.weight_version,
            "digests": hashes,
            "canary": to_dict(canary),
        }
        atomic.write_json(self.output_dir / MANIFEST, manifest)
        return manifest

    def _load_start(self) -> int:
        """Load the weights and moments that the round starts or resumes from; return the number of finished steps."""
        resumable = checkpoint.find_resumable(self.output_dir, self.fingerprint)
        if resumable is not None:
            directory, state = resumable
            logger.info("resuming after step %d of %d, from %s", state.step, self.plan.steps, directory)
            self.engine.load(directory, with_optimizer=True, exact=True)
            return state.step
        if self.job.init_checkpoint is not None:
            # Round 0's init_checkpoint has weights only; later ones are the previous round's.
            keep_moments = self.job.round_index > 0 and not self.job.training.optimizer.reset_each_round
            previous = Path(self.job.init_checkpoint)
            if not (keep_moments and self.engine.holds(previous)):
                self.engine.load(previous, with_optimizer=keep_moments)
        return 0

    def _train(self, first: int, metrics: StepMetrics | None) -> None:
        """Run the steps from ``first`` on, with checkpoints between them; stop after a step if a signal came."""
        for step in range(first, self.plan.steps):
            self._step(step, metrics)
            done = step + 1
            if done == self.plan.steps:
                return
            stop = self.stop.on_any_rank(self.engine.device)
            if stop or done % self.job.training.checkpoint_interval == 0:
                self._save(checkpoint.step_directory(self.output_dir, done), done)
            if stop:
                logger.warning("stopped by a signal after step %d of %d", done, self.plan.steps)
                raise SystemExit(STOPPED)

    def _step(self, step: int, metrics: StepMetrics | None) -> None:
        training, began = self.job.training, time.monotonic()
        rows = fill_up(self.data.rows_of(self.plan.groups_of(step)), training)
        shares = distribute_rows(rows, self.costs, training.parallel.data_parallel_size)
        lengths = [row_lengths(np.where(s >= 0, self.data.row_tokens[s], 0), training) for s in shares]
        rank = parallel_state.get_data_parallel_rank()
        real = rows[rows >= 0]
        rate = learning_rate(step, self.plan.steps, training.optimizer)
        result = self.engine.step(
            [self.data.row(int(index), length) for index, length in zip(shares[rank], lengths[rank], strict=True)],
            normaliser=float(self.data.row_weights[real].sum()),
            learning_rate=rate,
        )
        if metrics is not None:
            metrics.add(
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
        """Return the digests of the weights as a rollout engine will hold them. Called on all ranks together."""
        chunks, model = self.engine.chunks, self.job.model
        quantises = self.job.quantization == "fp8"
        scales = digests.block_scales(chunks, model, self.engine.device) if quantises else None
        return digests.parameter_digests(chunks, model, scales)

    def _canary(self) -> Canary:
        """Return the first tokens of the data with their log-probs by these weights. Called on all ranks together."""
        tokens = self.data.samples[0].trunk[:MAX_TOKENS]
        episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=1, tokens=tokens[1:]),))
        row = pack([episode], self.job.training.sequence_length).row(0)
        stages = self.job.training.parallel.pipeline_model_parallel_size
        computed = self.engine.logprobs([row] * stages)  # the interleaved schedule needs a micro-batch per stage
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        own = computed[0][: len(tokens) - 1].tolist() if computed else None  # on the last stage only
        torch.distributed.all_gather_object(gathered, own)
        logprobs = next(values for values in gathered if values is not None)
        return Canary(tokens=tuple(tokens.tolist()), logprobs=tuple(logprobs))


def peak_memory_mib() -> float:
    """Return this rank's peak memory: the GPU's if there is one, else the process's resident memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
