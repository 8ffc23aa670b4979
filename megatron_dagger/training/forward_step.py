"""The forward step that Megatron's schedules call for each micro-batch, whatever the loss is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_dagger.training.batch import MicroBatch
from megatron_dagger.training.model import bare

# From the cross-entropies (1, k) of a batch's targets to (scalar loss, number of label tokens, metrics).
Loss = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, torch.Tensor, Any]]
ForwardStep = Callable[[Iterator[MicroBatch], Any], Any]


class OutputLayerHooks:
    """Two corrections of a model chunk's output layer, as hooks on it.

    The layer computes the logits of ``label_places`` only (None: of all places): most tokens of an episode are not
    labels, and their loss would be multiplied by zero. The rows that pad the vocabulary get no probability, as in every
    engine that serves the model; Megatron would include them in the softmax. Set ``label_places`` before each forward
    pass: a GPTModel does not pass such an argument on to its output layer.
    """

    def __init__(self, chunk: Any, vocab_size: int) -> None:
        self.label_places: torch.Tensor | None = None
        layer = bare(chunk).output_layer
        columns = bare(chunk).vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first = columns * parallel_state.get_tensor_model_parallel_rank()
        self.real_columns = min(max(0, vocab_size - first), columns)  # this rank's logits that are not padding
        layer.register_forward_pre_hook(self._select)
        if self.real_columns < columns:
            layer.register_forward_hook(self._mask_padding)

    def _select(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        return (hidden if self.label_places is None else hidden[self.label_places], *rest)

    def _mask_padding(self, module: torch.nn.Module, args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        logits, *rest = output
        padding = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
        padding[self.real_columns :] = torch.finfo(logits.dtype).min / 2
        return (logits + padding, *rest)


def forward_step(chunks: Sequence[Any], vocab_size: int, loss: Loss) -> ForwardStep:
    """Return Megatron's forward step for ``loss``, and hook the output layers of ``chunks`` for it."""
    heads = [bare(chunk) for chunk in chunks if getattr(bare(chunk), "post_process", False)]
    hooks = {id(head): OutputLayerHooks(head, vocab_size) for head in heads}

    def step(batches: Iterator[MicroBatch], chunk: Any) -> Any:
        batch = next(batches)
        head_hooks = hooks.get(id(bare(chunk)))
        if head_hooks is not None:
            head_hooks.label_places = batch.label_places
        losses = chunk(batch.tokens, batch.position_ids, None, labels=batch.targets, packed_seq_params=batch.packed)
        return losses, lambda output: loss(output, batch)

    return step
