"""Digests computed in threads, in parallel with the transfer: hashing releases the interpreter's lock.

The threads also fetch a GPU tensor's bytes, a portion at a time through page-locked memory.
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

_MAX_THREADS = 8


class DigestPool:
    """A pool of threads that compute digest shares; a context manager that ends the threads."""

    def __init__(self, model: ModelConfig):
        self._model, self._shares = model, Shares()
        threads = min(_MAX_THREADS, max(1, len(os.sched_getaffinity(0)) // 2))  # the other cores copy weights
        self._pool = ThreadPoolExecutor(threads, "digests")
        self._running: list[Future[Shares]] = []

    def add(self, blocks: Sequence[Block], tensor: torch.Tensor) -> None:
        """Start to digest ``tensor``, made up of ``blocks``. It must not change before ``finish`` returns."""
        written = None
        if tensor.is_cuda:
            written = torch.cuda.Event()
            written.record(torch.cuda.current_stream(tensor.device))
        self._running.append(self._pool.submit(self._digest, blocks, tensor, written))

    def finish(self) -> Shares:
        """Wait for all started digests, and return the shares of all tensors so far."""
        for future in self._running:
            self._shares |= future.result()
        self._running.clear()
        return self._shares

    def _digest(self, blocks: Sequence[Block], tensor: torch.Tensor, written: Any) -> Shares:
        if written is None:
            return digest_shares(blocks, tensor, self._model)
        with torch.cuda.device(tensor.device), torch.no_grad():
            written.synchronize()  # this thread's stream is not ordered after the stream that writes
            return digest_shares(blocks, tensor, self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(cancel_futures=True)
