"""Transports carry the copies of a plan to the ranks of the engine.

A trainer or a checkpoint is described by a WeightSource. Each rank of the engine opens it (``open.open_transport``) and
receives the blocks of its copies in order, each valid until the next. At most two buckets are in memory. The
trainer's ranks send their side (``open.send_weights``).

A transport is an entry of ``TRANSPORTS`` and a module, which defines functions:

- ``open_transport(spec, target_rank, device) -> WeightTransport``: the engine's side. A transport that moves buckets
  implements the Protocol ``buckets.Receiver`` and returns ``buckets.BucketTransport`` around it;
- ``open_sender(spec, source_rank, device)``, a context manager of a ``buckets.Sender``: the trainer's side;
- ``new_address(host, directory) -> str``: an address that no other transfer uses. ``host`` is the trainer's name for
  other nodes, ``directory`` a directory for files of this trainer, which is removed after serving.

A module whose weights no trainer sends (``from_trainer=False``) needs the first function only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megatron_dagger.config.base import require
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.families.fp8 import Quantization, parameter_dtypes
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.transfer_plan import Copy, TransferPlan, plan
from megatron_dagger.weights.transports.buckets import BucketSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Transport:
    """A transport's module, imported when it is used, since it may import torch.

    ``from_trainer``: running trainer ranks send the weights. ``same_host``: all ranks of both sides must share a host.
    """

    module: str
    from_trainer: bool = True
    same_host: bool = False


# In order of preference: the first one that can be used is used.
TRANSPORTS = {
    "checkpoint": Transport(module="megatron_dagger.weights.transports.checkpoint", from_trainer=False),
    "shared_memory": Transport(module="megatron_dagger.weights.transports.shared_memory", same_host=True),
    "p2p": Transport(module="megatron_dagger.weights.transports.p2p"),
}


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    """A version of the weights and how to get it.

    ``kind``: a key of TRANSPORTS. ``address``: the checkpoint's directory, the directory of the trainer ranks' sockets
    (shared_memory), or HOST:PORT of source rank 0's store (p2p). ``layout``: the parallel layout of the trainer; a
    checkpoint counts as a single rank.
    """

    kind: str
    address: str
    layout: SourceLayout
    bucket_mib: int = 64
    deadline_s: float = 300.0  # for each wait

    def __post_init__(self) -> None:
        require(self.kind in TRANSPORTS, f"source.kind={self.kind!r}: choose one of {', '.join(TRANSPORTS)}")
        require(self.bucket_mib > 0, f"source.bucket_mib must be positive, got {self.bucket_mib}")
        require(self.deadline_s > 0, f"source.deadline_s must be positive, got {self.deadline_s}")
        require(
            self.from_trainer or self.layout.world_size == 1,
            f"a source of kind {self.kind} is a single rank, got a layout of {self.layout.world_size} ranks",
        )

    @property
    def from_trainer(self) -> bool:
        """Whether running trainer ranks send the weights from their memory."""
        return TRANSPORTS[self.kind].from_trainer

    @property
    def bucket_bytes(self) -> int:
        return self.bucket_mib << 20


def checkpoint_source(directory: Path, model: ModelConfig) -> WeightSource:
    """Return the source for a Megatron checkpoint. Raises CheckpointReadError if it is damaged or of another model."""
    layout = MegatronCheckpoint(directory).source_layout(model)
    return WeightSource(kind="checkpoint", address=str(directory), layout=layout)


@dataclass(frozen=True, kw_only=True)
class TransferSpec:
    """The facts on which both sides of a transfer must agree, and the plan and bucket sizes that follow from them.

    ``dtype``: torch's name of the dtype of the engine's weights that are not quantised.
    """

    model: ModelConfig
    target: TargetLayout
    dtype: str
    source: WeightSource
    quantization: Quantization = "none"

    @cached_property
    def bucket_spec(self) -> BucketSpec:
        dtypes = parameter_dtypes(self.model, self.quantization, self.dtype)
        return BucketSpec(bucket_bytes=self.source.bucket_bytes, dtypes=dtypes)

    @property
    def plan(self) -> TransferPlan:
        return _plan(self.model, self.source.layout, self.target, self.quantization)

    def digest(self) -> str:
        """Return a hash that is equal on both sides exactly if they carry out the same plan in the same buckets."""
        parts = [self.model, self.target, self.dtype, self.quantization, self.source.layout, self.source.bucket_mib]
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_plan = lru_cache(maxsize=4)(plan)


class WeightTransport(Protocol):
    """A target rank's connection to a WeightSource; a context manager."""

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Yield (copy, block) in the order of ``copies``; a copy may arrive in several parts.

        The block has the shape of its copy and the dtype of the engine's parameter, and is valid until the next is
        requested. Raises WeightSyncError if the weights do not arrive, or not within the deadline.
        """
        ...

    def __enter__(self) -> WeightTransport: ...

    def __exit__(self, *exc_info: object) -> None: ...


__all__ = ["TRANSPORTS", "TransferSpec", "Transport", "WeightSource", "WeightTransport", "checkpoint_source"]
