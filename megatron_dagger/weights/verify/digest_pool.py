"""Digests of parameters in threads, beside what else is done with the weights: hashing leaves the interpreter's lock.

Of a GPU's tensor the threads fetch the bytes as well, through page-locked memory, a portion at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import torch

from megatron_dagger.config import ModelConfig
from megatron_dagger.weights.blocks import Block
from megatron_dagger.weights.verify.digest import Shares, digest_shares

_MOST_THREADS = 8


class DigestPool:
    """A context manager: its threads end with the block."""

    def __init__(self, model: ModelConfig):
        self._model, self._shares = model, Shares()
        threads = min(_MOST_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))  # the others copy
        self._pool = ThreadPoolExecutor(threads, "digests")
        self._running: list[Future[Shares]] = []

    def add(self, blocks: Sequence[Block], tensor: torch.Tensor) -> None:
        """Of what stands in ``tensor``, made up of ``blocks``; it must not change before ``finish``."""
        written = None
        if tensor.is_cuda:
            written = torch.cuda.Event()
            written.record(torch.cuda.current_stream(tensor.device))
        self._running.append(self._pool.submit(self._digest, blocks, tensor, written))

    def finish(self) -> Shares:
        """All that there are, once they are there."""
        for future in self._running:
            self._shares |= future.result()
        self._running.clear()
        return self._shares

    def _digest(self, blocks: Sequence[Block], tensor: torch.Tensor, written: Any) -> Shares:
        if written is None:
            return digest_shares(blocks, tensor, self._model)
        with torch.cuda.device(tensor.device), torch.no_grad():
            written.synchronize()  # this thread's stream knows nothing of the one that writes
            return digest_shares(blocks, tensor, self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)
