"""Buckets: the copies of a plan in groups of bounded size, the same on both sides.

A target rank's copies fill buckets of at most ``bucket_bytes``, in order, each copy in its parameter's dtype. The
copies of a bucket that come from the same source rank form a segment, which is sent as a unit. A source sends its
segments ordered by bucket number, then target rank. Hence both sides know the order, no cycle of waits can form, and
with two buffers on each side a bucket is in flight while the next is packed or the previous is copied out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from megatron_dagger.weights.blocks import ITEMSIZE, Box
from megatron_dagger.weights.transfer_plan import Copy, TransferPlan

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 4  # bytes: every dtype's elements can then be viewed where they lie


@dataclass(frozen=True, kw_only=True)
class BucketSpec:
    """The size of a bucket, and the dtype of each parameter of the engine, by torch's name."""

    bucket_bytes: int
    dtypes: Mapping[str, str]

    def dtype(self, copy: Copy) -> torch.dtype:
        """Return the dtype in which the copy is sent."""
        import torch

        dtype: torch.dtype = getattr(torch, self.dtypes[copy.target_parameter])
        return dtype

    def max_elements(self, copy: Copy) -> int:
        """Return how many elements of the copy's parameter fit into a bucket."""
        return self.bucket_bytes // ITEMSIZE[self.dtypes[copy.target_parameter]]

    def bytes(self, copy: Copy) -> int:
        """Return the bytes that the copy takes up in a bucket, with alignment."""
        size = copy.source.elements * ITEMSIZE[self.dtypes[copy.target_parameter]]
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def blocks(self, copies: Iterable[Copy], data: torch.Tensor) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Yield (copy, block) with views of ``data``, (bytes,) uint8, in which the copies are adjacent."""
        start = 0
        for copy in copies:
            dtype = self.dtype(copy)
            values = data[start : start + copy.source.elements * dtype.itemsize]
            yield copy, values.view(dtype).view(copy.source.shape)
            start += self.bytes(copy)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The copies of a target rank's bucket that come from the same source rank."""

    source_rank: int
    target_rank: int
    copies: tuple[Copy, ...]
    bytes: int


class Sender(Protocol):
    """A source rank's side of a transport. All methods raise WeightSyncError at the deadline or if a peer is gone."""

    def buffer(self, segment: Segment) -> torch.Tensor:
        """Wait for a free buffer and return its first ``segment.bytes`` bytes, (bytes,) uint8."""
        ...

    def send(self, segment: Segment) -> None:
        """Send the segment whose bytes are now in the buffer returned by the last ``buffer()`` call."""
        ...

    def finish(self) -> None:
        """Wait until all segments have arrived."""
        ...


class Receiver(Protocol):
    """A target rank's side of a transport. ``receive`` raises WeightSyncError at the deadline or if a peer is gone."""

    def expect(self, bucket: Sequence[Segment]) -> None:
        """Prepare for the next bucket's segments. At most two buckets are expected at a time."""
        ...

    def receive(self, segment: Segment) -> torch.Tensor:
        """Wait for the segment and return its bytes, (bytes,) uint8, valid until ``release``."""
        ...

    def release(self, segment: Segment) -> None:
        """Allow the segment's buffer to be overwritten."""
        ...

    def close(self) -> None:
        """Release buffers and connections."""
        ...


def buckets(copies: Sequence[Copy], bucket_spec: BucketSpec) -> list[list[Copy]]:
    """Group a target rank's copies into buckets. A copy larger than a bucket is split along its first dimensions."""
    groups: list[list[Copy]] = []
    bytes_free = 0
    for copy in split_large(copies, bucket_spec):
        if (size := bucket_spec.bytes(copy)) > bytes_free:
            groups.append([])
            bytes_free = bucket_spec.bucket_bytes
        groups[-1].append(copy)
        bytes_free -= size
    return groups


def split_large(copies: Iterable[Copy], bucket_spec: BucketSpec) -> Iterator[Copy]:
    """Yield the copies, with those larger than a bucket split into parts."""
    return itertools.chain.from_iterable(_split(copy, bucket_spec.max_elements(copy)) for copy in copies)


def segments(bucket: Sequence[Copy], bucket_spec: BucketSpec) -> list[Segment]:
    """Return the segments of a bucket, ordered by source rank."""
    by_source: dict[int, list[Copy]] = {}
    for copy in bucket:
        by_source.setdefault(copy.source_rank, []).append(copy)
    return [
        Segment(
            source_rank=rank,
            target_rank=copies[0].target_rank,
            copies=tuple(copies),
            bytes=sum(map(bucket_spec.bytes, copies)),
        )
        for rank, copies in sorted(by_source.items())
    ]


def outgoing(plan: TransferPlan, source_rank: int, bucket_spec: BucketSpec) -> Iterator[Segment]:
    """Yield the segments that a source rank sends, in order."""
    by_target = [buckets(copies, bucket_spec) for _, copies in sorted(plan.by_target.items())]
    for same_number in itertools.zip_longest(*by_target):
        for bucket in filter(None, same_number):
            yield from (segment for segment in segments(bucket, bucket_spec) if segment.source_rank == source_rank)


def send(
    plan: TransferPlan,
    source_rank: int,
    pack: Callable[[Copy, torch.Tensor], None],
    sender: Sender,
    bucket_spec: BucketSpec,
) -> None:
    """Send a source rank's part of the plan. ``pack(copy, into)`` writes a copy's block into a view of a buffer."""
    for segment in outgoing(plan, source_rank, bucket_spec):
        for copy, into in bucket_spec.blocks(segment.copies, sender.buffer(segment)):
            pack(copy, into)
        sender.send(segment)
    sender.finish()


class BucketTransport:
    """A WeightTransport that receives buckets."""

    def __init__(self, receiver: Receiver, bucket_spec: BucketSpec):
        self._receiver, self._bucket_spec = receiver, bucket_spec

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        spec = self._bucket_spec
        pending = [(bucket, segments(bucket, spec)) for bucket in buckets(copies, spec)]
        if pending:
            self._receiver.expect(pending[0][1])
        for (bucket, current), (_, following) in itertools.zip_longest(pending, pending[1:], fillvalue=([], [])):
            if following:
                self._receiver.expect(following)
            blocks: dict[int, Iterator[tuple[Copy, torch.Tensor]]] = {}
            for segment in current:
                blocks[segment.source_rank] = spec.blocks(segment.copies, self._receiver.receive(segment))
            for copy in bucket:
                yield next(blocks[copy.source_rank])
            for segment in current:
                self._receiver.release(segment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._receiver.close()


def _split(copy: Copy, max_elements: int, axis: int = 0) -> Iterator[Copy]:
    """Yield the copy in parts of at most ``max_elements``, split along ``axis`` and, if needed, those after it."""
    shape = copy.source.shape
    if copy.source.elements <= max_elements or axis == len(shape):
        yield copy
        return
    step = max(1, max_elements // math.prod(shape[axis + 1 :]))
    for first in range(0, shape[axis], step):
        start = tuple(first if i == axis else 0 for i in range(len(shape)))
        extent = (*shape[:axis], min(step, shape[axis] - first), *shape[axis + 1 :])
        yield from _split(copy.part(Box(start, extent)), max_elements, axis + 1)
