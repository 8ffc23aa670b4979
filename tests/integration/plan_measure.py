"""A rank that measures its parameters, its bytes of state, and the bytes that autograd keeps during a real step.

    python -m tests.integration.plan_measure OUT CASE.json ...

A case is {"model": ..., "training": ...}; rank N writes OUT/CASE-N.json.
"""

from __future__ import annotations

import json
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from megatron_dagger.config import ModelConfig, TrainingConfig, build
from megatron_dagger.training.data import packing
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.model import bare
from megatron_dagger.training.optimizer import each_optimizer
from megatron_dagger.training.ranks.process_groups import process_groups
from megatron_dagger.types import LabelledEpisode, StateLabel


class KeptForBackward:
    """Hooks that sum the bytes of the storages that autograd holds, each once, and record the peak."""

    def __init__(self, parameters: set[int]) -> None:
        self._parameters = parameters
        self._holders: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> object:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._parameters:
            return lambda: tensor
        if not self._holders.get(key):
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        self._holders[key] = self._holders.get(key, 0) + 1

        def unpacked() -> torch.Tensor:
            return tensor

        weakref.finalize(unpacked, self._released, key, size)
        return unpacked

    def unpack(self, unpacked: object) -> torch.Tensor:
        return unpacked()  # type: ignore[operator]

    def _released(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            self.bytes -= size


def row_of(training: TrainingConfig, vocab_size: int, label_share: float) -> packing.PackedRow:
    """Return a full row: one episode whose last tokens are labels."""
    length = training.sequence_length
    tokens = np.random.default_rng(0).integers(0, vocab_size, length + 1).astype(np.int32)
    start = length + 1 - round(length * label_share)
    episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=start, tokens=tokens[start:]),))
    return packing.pack([episode], length).row(0)


def measure(model: ModelConfig, training: TrainingConfig, label_share: float) -> dict[str, float]:
    """Return the measurements of this rank. Must run inside ``process_groups``."""
    engine = MegatronEngine(model, training, seed=1, device=torch.device("cpu"))
    parameters = [p for chunk in engine.chunks for p in bare(chunk).parameters()]
    rows = [row_of(training, model.vocab_size, label_share)] * training.micro_batches
    kept = KeptForBackward({p.untyped_storage().data_ptr() for p in parameters})
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        engine.forward_backward(rows, normaliser=1.0)
    assert kept.bytes == 0, "the backward pass did not release everything"
    engine.step(rows, normaliser=1.0, learning_rate=1e-4)
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "parameters": sum(p.numel() for p in parameters),
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters),
        "optimizer": sum(_state_bytes(inner, parameters) for inner in each_optimizer(engine.optimizer)),
        "activations": kept.peak,
    }


def _state_bytes(optimizer: object, parameters: list[torch.nn.Parameter]) -> int:
    """Return the bytes of the moments, and of main weights that are not the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    total = 0
    for group in optimizer.optimizer.param_groups:  # type: ignore[attr-defined]
        for main in group["params"]:
            state = optimizer.optimizer.state[main]  # type: ignore[attr-defined]
            tensors = [state["exp_avg"], state["exp_avg_sq"]]
            if main.untyped_storage().data_ptr() not in weights:
                tensors.append(main)
            total += sum(t.numel() * t.element_size() for t in tensors)
    return total


def main() -> None:
    out, *cases = sys.argv[1:]
    for case in map(Path, cases):
        settings = json.loads(case.read_text())
        model, training = build(ModelConfig, settings["model"]), build(TrainingConfig, settings["training"])
        with process_groups(training.parallel, seed=1, timeout_s=120.0, threads=1):
            result = measure(model, training, settings["label_share"])
            path = Path(out) / f"{case.stem}-{torch.distributed.get_rank()}.json"
        path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
