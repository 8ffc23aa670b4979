"""The executors of a plan: three ways for the copies of a plan to reach a rank of the engine.

- ``checkpoint``: out of the files of a Megatron checkpoint, each rank only what it needs of them;
- ``host``: through shared memory (on a GPU: CUDA IPC) from trainer ranks on the same host;
- ``live``: point to point from trainer ranks anywhere, by gloo or NCCL.

A trainer makes an WeightSource; the engine's ranks are told of it and open it. Whatever the way, they are
given the blocks of their copies one after the other, each valid until the next, so that no more than
two buckets are in memory. ``send`` is the trainer's end of the last two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_dagger.config.base import require
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.families.fp8 import Quantization, wire_dtypes
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.transfer_plan import Copy, TransferPlan, plan
from megatron_dagger.weights.transports.buckets import BucketSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """Where a version of the weights can be had.

    ``address``: the checkpoint's directory; the directory of the trainer ranks' sockets; or HOST:PORT of
    source rank 0's store. ``source``: how the trainer holds them (of a checkpoint: as one whole).
    """

    kind: Literal["checkpoint", "host", "live"]
    address: str
    source: SourceLayout
    bucket_mib: int = 64
    deadline_s: float = 300.0  # for every single wait

    def __post_init__(self) -> None:
        require(self.bucket_mib > 0, f"offer.bucket_mib must be positive, got {self.bucket_mib}")
        require(self.deadline_s > 0, f"offer.deadline_s must be positive, got {self.deadline_s}")
        require(
            self.kind != "checkpoint" or self.source.world_size == 1,
            f"a checkpoint is one whole, not {self.source.world_size} ranks",
        )

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib << 20


def checkpoint_offer(directory: Path, model: ModelConfig) -> WeightSource:
    """The WeightSource of a Megatron checkpoint. Raises CheckpointReadError if it cannot be read or is another model's."""
    source = MegatronCheckpoint(directory).source_layout(model)
    return WeightSource(kind="checkpoint", address=str(directory), source=source)


@dataclass(frozen=True, kw_only=True)
class TransferSpec:
    """What both ends of a transfer must have in common, and what follows from it.

    ``dtype`` is torch's name of what the engine holds its weights in, but those that are quantised.
    """

    model: ModelConfig
    target: TargetLayout
    dtype: str
    offer: WeightSource
    quantization: Quantization = "none"

    @cached_property
    def wire(self) -> BucketSpec:
        dtypes = wire_dtypes(self.model, self.quantization, self.dtype)
        return BucketSpec(bucket_bytes=self.offer.bucket_bytes, dtypes=dtypes)

    @property
    def plan(self) -> TransferPlan:
        return _plan(self.model, self.offer.source, self.target, self.quantization)

    def digest(self) -> str:
        """The same at both ends exactly if they carry out the same plan in the same way."""
        parts = [self.model, self.target, self.dtype, self.quantization, self.offer.source, self.offer.bucket_mib]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_plan = lru_cache(maxsize=4)(plan)


class WeightTransport(Protocol):
    """One rank's way to the weights of an WeightSource; a context manager."""

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Yield what the copies bring, in their order: a copy, or a part of it, and its block.

        The block has the shape of the copy, and is valid until the next one is asked for. Raises
        WeightSyncError if it cannot be had, or not within the deadline.
        """
        ...

    def __enter__(self) -> WeightTransport: ...

    def __exit__(self, *exc_info: object) -> None: ...


__all__ = ["TransferSpec", "WeightSource", "WeightTransport", "checkpoint_offer"]
