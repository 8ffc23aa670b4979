"""The model, its gradients and its optimizer on this rank: one call is one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.training import checkpoint, loss, model, optimizer
from megatron_dagger.training.data.packing import PackedRow


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The normalised loss of the global batch, and its gradient's norm before clipping."""

    loss: float
    grad_norm: float


class MegatronEngine:
    """Built on all ranks together, inside ``parallel.process_groups``."""

    def __init__(self, model_config: ModelConfig, training: TrainingConfig, *, seed: int, device: torch.device) -> None:
        model.check_supported(model_config, training)
        self.model_config, self.training, self.device = model_config, training, device
        config = model.transformer_config(model_config, training)
        chunks = model.build(model_config, training, config)
        model.initialize_weights(chunks, model_config, seed)
        self.chunks = optimizer.data_parallel(chunks, training)
        self.optimizer = optimizer.build(self.chunks, training)
        self.holds: Path | None = None  # the checkpoint that says what weights and moments are, if one does
        self._stepped = False
        self.select = not training.parallel.sequence_parallel  # there each rank has other positions
        heads = [model.bare(c) for c in self.chunks if getattr(model.bare(c), "post_process", False)]
        self._forward_step = loss.forward_step(
            {id(head): loss.LabelLogits(head, model_config.vocab_size) for head in heads}
        )
        self._attention = model.attention(training)
        self._schedule = get_forward_backward_func()

    def load(self, directory: Path, *, with_optimizer: bool, exact: bool = False) -> None:
        """Take weights, and the optimizer's state if asked, from a checkpoint of any layout.

        ``exact``, to resume a round, needs a checkpoint of the same precision.
        """
        checkpoint.check_model(directory, self.model_config)
        if self._stepped and not with_optimizer:  # the moments are to be forgotten
            self.optimizer = optimizer.build(self.chunks, self.training)
        saved = checkpoint.load(directory, self.chunks, self.optimizer if with_optimizer else None, exact=exact)
        if not with_optimizer:  # the main copy of BF16 weights; of FP8 weights as they were before they were rounded
            self.optimizer.reload_model_params(saved if self.training.fp8_param_gather else None)
        self.holds = directory if with_optimizer else None

    def save(self, directory: Path, state: checkpoint.CheckpointState) -> None:
        """Write weights and optimizer to ``directory``; see checkpoint.save."""
        checkpoint.save(directory, self.chunks, self.optimizer, state)
        self.holds = directory

    def step(self, rows: Sequence[PackedRow], *, normaliser: float, learning_rate: float) -> StepResult:
        """Train on this data-parallel rank's ``rows``, one a micro-batch.

        ``normaliser`` is the sum of the label weights of all ranks' rows. The result is the same on
        every rank.
        """
        self.holds, self._stepped = None, True
        value = self.forward_backward(rows, normaliser=normaliser)
        optimizer.set_learning_rate(self.optimizer, learning_rate)
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "only FP16 with loss scaling skips steps"
        return StepResult(loss=value, grad_norm=float(grad_norm or 0.0))

    def forward_backward(self, rows: Sequence[PackedRow], *, normaliser: float) -> float:
        """Leave the global batch's gradient in the chunks' buffers and return its loss."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = self._run(rows, max(normaliser, 1e-6), forward_only=False, select=self.select)
        return self._total([part["loss"] for part in parts])

    @torch.no_grad()
    def logprobs(self, rows: Sequence[PackedRow]) -> list[np.ndarray] | None:
        """For each row (s,) float32, the log-probability of every target; None but on the last stage."""
        losses: list[np.ndarray] = []

        def keep(batches: Iterator[loss.MicroBatch], chunk: Any) -> Any:
            output, _ = self._forward_step(batches, chunk)

            def collect(values: torch.Tensor) -> Any:
                losses.append(-values.float().cpu().numpy().reshape(-1))
                return values.sum(), torch.tensor(values.numel(), dtype=torch.int), {}

            return output, collect

        for chunk in self.chunks:
            chunk.eval()
        self._run(rows, 1.0, forward_only=True, select=False, forward_step=keep)
        return losses if parallel_state.is_pipeline_last_stage() else None

    def _run(
        self,
        rows: Sequence[PackedRow],
        normaliser: float,
        *,
        forward_only: bool,
        select: bool,
        forward_step: Any = None,
    ) -> list[Any]:
        batches = [
            loss.micro_batch(row, normaliser, self.device, select=select, attention=self._attention) for row in rows
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

    def _total(self, parts: list[torch.Tensor]) -> float:
        """The sum over micro-batches and data-parallel ranks, on every rank of every stage."""
        total = torch.zeros(1, dtype=torch.float64, device=self.device)
        if parts and parallel_state.get_tensor_model_parallel_rank() == 0:
            total += torch.stack(parts).double().sum()
        torch.distributed.all_reduce(total)
        return float(total)
