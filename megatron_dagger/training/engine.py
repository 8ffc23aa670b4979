"""The model, its gradients and its optimizer on this rank: one call is one optimizer step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.training import checkpoint, megatron_config, model, optimizer
from megatron_dagger.training.batch import MicroBatch, micro_batch
from megatron_dagger.training.data.packing import PackedRow
from megatron_dagger.training.forward_step import forward_step
from megatron_dagger.training.loss import weighted_loss

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The normalised loss of the global batch, and its gradient's norm before clipping."""

    loss: float
    grad_norm: float


class Moments(Enum):
    """The origin of the optimizer's moments."""

    NONE = "no step was taken since the weights were initialised or loaded"
    SAVED = "weights and moments are those of a checkpoint"
    UNSAVED = "steps were taken that no checkpoint has"


class MegatronEngine:
    """Model, gradients and optimizer of this rank. All methods are called on all ranks together.

    Must be built inside ``ranks.process_groups``. Raises ConfigError for settings that this machine cannot run.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        training: TrainingConfig,
        *,
        seed: int,
        device: torch.device,
        random_weights: bool = True,
    ) -> None:
        """``random_weights=False`` saves the minute that billions of them take; ``load`` must then come first."""
        megatron_config.check_supported(model_config, training)
        self.model_config, self.training, self.device = model_config, training, device
        chunks = model.build(model_config, training, megatron_config.transformer_config(model_config, training))
        if random_weights:
            logger.info("drawing random weights from seed %d", seed)
            model.initialize_weights(chunks, model_config, seed)
        self.chunks = optimizer.data_parallel(chunks, training)
        self.optimizer = optimizer.build(self.chunks, training)
        self.moments = Moments.NONE
        self._checkpoint: Path | None = None  # the source of weights and moments, if SAVED
        # With sequence parallelism each rank holds different places, so the output layer computes all of them.
        self.labels_only = not training.parallel.sequence_parallel
        self._forward_step = forward_step(self.chunks, model_config.vocab_size, weighted_loss)
        self._attention = megatron_config.attention_kind(training)
        self._schedule = get_forward_backward_func()

    def holds(self, directory: Path) -> bool:
        """Return whether weights and moments in memory are those of the checkpoint ``directory``."""
        return self.moments is Moments.SAVED and self._checkpoint == directory

    def load(self, directory: Path, *, with_optimizer: bool, exact: bool = False) -> None:
        """Load the weights, and with ``with_optimizer`` the moments, from a checkpoint of any parallel layout.

        Without ``with_optimizer`` the moments start from zero. ``exact``, to resume a round, needs a checkpoint of
        the same precision. Raises CheckpointError for a missing or half-written checkpoint, or another model's.
        """
        checkpoint.check_model(directory, self.model_config)
        if self.moments is not Moments.NONE and not with_optimizer:
            self.optimizer = optimizer.build(self.chunks, self.training)
        saved = checkpoint.load(directory, self.chunks, self.optimizer if with_optimizer else None, exact=exact)
        if with_optimizer:
            self._set_saved(directory)
            return
        # The optimizer has main copies of BF16 weights, and of FP8 weights from before they were rounded.
        self.optimizer.reload_model_params(saved if self.training.fp8_param_gather else None)
        self.moments = Moments.NONE

    def save(self, directory: Path, state: checkpoint.CheckpointState) -> None:
        """Write weights and optimizer to ``directory``; see checkpoint.save."""
        checkpoint.save(directory, self.chunks, self.optimizer, state)
        self._set_saved(directory)

    def step(self, rows: Sequence[PackedRow], *, normaliser: float, learning_rate: float) -> StepResult:
        """Take a step on this data-parallel rank's ``rows``, one per micro-batch; return the same result on every rank.

        ``normaliser`` is the sum of the label weights of all ranks' rows. Raises RuntimeError if the optimizer
        skips the step.
        """
        self.moments = Moments.UNSAVED
        loss = self.forward_backward(rows, normaliser=normaliser)
        optimizer.set_learning_rate(self.optimizer, learning_rate)
        succeeded, grad_norm, _ = self.optimizer.step()
        if not succeeded:  # only FP16 with loss scaling may skip steps
            raise RuntimeError(
                f"Megatron's optimizer skipped a step (loss {loss}, gradient norm {grad_norm}), which it does when "
                f"gradients are not finite; lower training.optimizer.lr={self.training.optimizer.lr}"
            )
        return StepResult(loss=loss, grad_norm=float(grad_norm or 0.0))

    def forward_backward(self, rows: Sequence[PackedRow], *, normaliser: float) -> float:
        """Leave the global batch's gradient in the chunks' buffers, and return its loss."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        metrics = self._run(rows, max(normaliser, 1e-6), forward_only=False, labels_only=self.labels_only)
        return self._total([values["loss"] for values in metrics])

    @torch.no_grad()
    def logprobs(self, rows: Sequence[PackedRow]) -> list[np.ndarray] | None:
        """Return the log-probability of every target, (s,) float32 per row; None on all but the last stage.

        Computed without FP8, whose rounding would hide an error in the weights: in BF16 if training is in FP8.
        """
        logprobs: list[np.ndarray] = []

        def keep(batches: Iterator[MicroBatch], chunk: Any) -> Any:
            output, _ = self._forward_step(batches, chunk)

            def collect(losses: torch.Tensor) -> Any:
                logprobs.append(-losses.float().cpu().numpy().reshape(-1))
                return losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

            return output, collect

        for chunk in self.chunks:
            chunk.eval()
        with megatron_config.without_fp8(model.bare(chunk).config for chunk in self.chunks):
            self._run(rows, 1.0, forward_only=True, labels_only=False, forward_step=keep)
        return logprobs if parallel_state.is_pipeline_last_stage() else None

    def _set_saved(self, directory: Path) -> None:
        self.moments, self._checkpoint = Moments.SAVED, directory

    def _run(
        self,
        rows: Sequence[PackedRow],
        normaliser: float,
        *,
        forward_only: bool,
        labels_only: bool,
        forward_step: Any = None,
    ) -> list[Any]:
        """Run Megatron's schedule over ``rows``; return the metrics of each micro-batch, on the last stage only."""
        batches = [
            micro_batch(row, normaliser, self.device, labels_only=labels_only, attention=self._attention)
            for row in rows
        ]
        several = len(self.chunks) > 1
        result = self._schedule(
            forward_step_func=forward_step or self._forward_step,
            data_iterator=[iter(batches) for _ in self.chunks] if several else iter(batches),
            model=self.chunks if several else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=len(rows[0].tokens),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        return list(result or [])

    def _total(self, losses: list[torch.Tensor]) -> float:
        """Return the sum over micro-batches and data-parallel ranks, on every rank of every stage."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            total += torch.stack(losses).double().sum()
        torch.distributed.all_reduce(total)
        return float(total)
