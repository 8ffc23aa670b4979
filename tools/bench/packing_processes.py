"""The processes of tools.bench.packing: each does the forward and backward passes of one variant's rows."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.training.data import batches, packing
from megatron_dagger.training.data.episode_file import load_episodes
from megatron_dagger.types import LabelledEpisode

MODEL = ModelConfig(num_layers=2, vocab_size=4096, max_position_embeddings=131_072)
GRADIENT_LONGEST = 4096
DEADLINE_S = 1800.0


@dataclass(frozen=True)
class Cost:
    """The cost of some rows: their number and tokens, wall and CPU seconds, and the seconds spent building them."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    waiting: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def per_state(episodes: Sequence[LabelledEpisode]) -> list[LabelledEpisode]:
    """Return an episode for every label, ending with it."""
    return [
        LabelledEpisode(tokens=np.concatenate([episode.tokens[: label.position], label.tokens]), labels=(label,))
        for episode in episodes
        for label in episode.labels
    ]


@contextmanager
def _engine(sequence_length: int) -> Iterator[Any]:
    from megatron_dagger.training import compat
    from megatron_dagger.training.engine import MegatronEngine
    from megatron_dagger.training.ranks.process_groups import process_groups

    compat.quiet()
    training = TrainingConfig(
        sequence_length=sequence_length,
        global_batch_tokens=sequence_length,
        packing="shared_prefix",
        deadline_s=DEADLINE_S,
    )
    with process_groups(training.parallel, seed=1, timeout_s=DEADLINE_S, threads=1) as device:
        yield MegatronEngine(MODEL, training, seed=1, device=device)


def serve(arguments: argparse.Namespace) -> None:
    """For each line of standard input, do the passes of a few rows and print their Cost."""
    from megatron_dagger.training.batch import micro_batch

    data = packing.pack(load_episodes(arguments.folder / f"{arguments.worker}.npz"), arguments.sequence_length)
    rng = np.random.default_rng(arguments.seed)
    order = itertools.chain.from_iterable(rng.permutation(len(data.rows)) for _ in itertools.count())
    with _engine(arguments.sequence_length) as engine:
        engine.forward_backward([data.row(batches.EMPTY_ROW)], normaliser=1.0)
        print("READY", flush=True)
        for _ in sys.stdin:
            cost = Cost()
            while cost.seconds < arguments.seconds:
                index = int(next(order))
                began, cpu = time.perf_counter(), time.process_time()
                (length,) = batches.row_lengths(data.row_tokens[[index]], engine.training)
                row = data.row(index, length)
                built = time.perf_counter()
                engine.forward_backward([row], normaliser=float(data.row_weights[index]))
                end, cpu = time.perf_counter(), time.process_time() - cpu
                # The pass has built this micro-batch too; it is built again to time it alone.
                micro_batch(row, 1.0, engine.device, labels_only=engine.labels_only)
                waiting = built - began + time.perf_counter() - end
                cost += Cost(1, int(data.row_tokens[index]), end - began, cpu, waiting)
            print("COST " + json.dumps(astuple(cost)), flush=True)


def compare_gradients(arguments: argparse.Namespace) -> None:
    """Print how far shared_prefix differs from per_state: the loss, and the gradients relative to the largest."""
    from megatron_dagger.training import param_names
    from megatron_dagger.training.model import bare

    episodes = load_episodes(arguments.folder / "gradients.npz")
    size = 2 * GRADIENT_LONGEST
    results = []
    with _engine(size) as engine:
        for variant in (per_state(episodes), episodes):
            data = packing.pack(variant, size)
            rows = [data.row(index) for index in range(len(data.rows))]
            loss = engine.forward_backward(rows, normaliser=float(data.row_weights.sum()))
            parameters = [parameter for _, parameter in param_names.global_parameters(bare(engine.chunks[0]))]
            results.append((loss, [parameter.main_grad.clone() for parameter in parameters]))
    (loss, gradients), (shared_loss, shared_gradients) = results
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    difference = max(float((a - b).abs().max()) for a, b in zip(gradients, shared_gradients, strict=True))
    print(
        "DIFFERENCE " + json.dumps({"loss": abs(shared_loss - loss) / loss, "gradient": difference / largest}),
        flush=True,
    )
