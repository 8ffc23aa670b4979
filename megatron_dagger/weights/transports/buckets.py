"""Buckets: the copies of a plan in portions of bounded size, the same ones at both ends.

A target rank's copies go, in their order, into buckets of at most ``bucket_bytes``, each in its parameter's
dtype; what a bucket holds of one source rank is a segment, which is sent as one. A source sends its segments
by bucket number, then target rank. So both ends know what comes next, nobody waits in a circle, and with two
buffers at each end one bucket travels while another is packed or taken in.
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
    """How blocks travel: in buckets of so many bytes, and ``dtypes``, of each parameter of the engine."""

    bucket_bytes: int
    dtypes: Mapping[str, str]

    def dtype(self, copy: Copy) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtypes[copy.target_parameter])
        return dtype

    def most_elements(self, copy: Copy) -> int:
        """Of a copy to this parameter, that a bucket takes."""
        return self.bucket_bytes // ITEMSIZE[self.dtypes[copy.target_parameter]]

    def bytes(self, copy: Copy) -> int:
        """What a copy takes of a bucket."""
        size = copy.source.elements * ITEMSIZE[self.dtypes[copy.target_parameter]]
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def blocks(self, copies: Iterable[Copy], data: torch.Tensor) -> Iterator[tuple[Copy, torch.Tensor]]:
        """Each copy's block in ``data``, (bytes,) uint8, where they lie one after the other."""
        start = 0
        for copy in copies:
            dtype = self.dtype(copy)
            values = data[start : start + copy.source.elements * dtype.itemsize]
            yield copy, values.view(dtype).view(copy.source.shape)
            start += self.bytes(copy)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What one bucket of a target rank holds of one source rank: its copies, one after the other."""

    source_rank: int
    target_rank: int
    copies: tuple[Copy, ...]
    bytes: int


class Sender(Protocol):
    """A source rank's end of a channel."""

    def buffer(self, segment: Segment) -> torch.Tensor:
        """Where to put the segment, once there is room: (bytes,) uint8."""
        ...

    def send(self, segment: Segment) -> None:
        """The buffer asked for last is full."""
        ...

    def finish(self) -> None:
        """Return when everything has arrived."""
        ...


class Receiver(Protocol):
    """A target rank's end of a channel."""

    def expect(self, bucket: Sequence[Segment]) -> None:
        """These will be received after those that are expected already; at most two buckets are."""
        ...

    def receive(self, segment: Segment) -> torch.Tensor:
        """The segment, (bytes,) uint8, once it is there; valid until ``release``."""
        ...

    def release(self, segment: Segment) -> None:
        """It is not needed any more."""
        ...

    def close(self) -> None: ...


def buckets(copies: Sequence[Copy], wire: BucketSpec) -> list[list[Copy]]:
    """A target rank's copies in buckets; what is larger than a bucket is cut along its first dimensions."""
    found: list[list[Copy]] = []
    room = 0
    for copy in cut(copies, wire):
        if (size := wire.bytes(copy)) > room:
            found.append([])
            room = wire.bucket_bytes
        found[-1].append(copy)
        room -= size
    return found


def cut(copies: Iterable[Copy], wire: BucketSpec) -> Iterator[Copy]:
    """The copies, those that are larger than a bucket in parts."""
    return itertools.chain.from_iterable(_cut(copy, wire.most_elements(copy)) for copy in copies)


def segments(bucket: Sequence[Copy], wire: BucketSpec) -> list[Segment]:
    """The segments of a bucket, by source rank."""
    by_source: dict[int, list[Copy]] = {}
    for copy in bucket:
        by_source.setdefault(copy.source_rank, []).append(copy)
    return [
        Segment(
            source_rank=rank,
            target_rank=copies[0].target_rank,
            copies=tuple(copies),
            bytes=sum(map(wire.bytes, copies)),
        )
        for rank, copies in sorted(by_source.items())
    ]


def outgoing(plan: TransferPlan, source_rank: int, wire: BucketSpec) -> Iterator[Segment]:
    """What a source rank sends, in its order."""
    by_target = [buckets(copies, wire) for _, copies in sorted(plan.by_target.items())]
    for row in itertools.zip_longest(*by_target):
        for bucket in filter(None, row):
            yield from (segment for segment in segments(bucket, wire) if segment.source_rank == source_rank)


def send(
    plan: TransferPlan, source_rank: int, pack: Callable[[Copy, torch.Tensor], None], sender: Sender, wire: BucketSpec
) -> None:
    """Send all that the plan wants of this source rank; ``pack`` puts a copy's block where it is told."""
    for segment in outgoing(plan, source_rank, wire):
        for copy, into in wire.blocks(segment.copies, sender.buffer(segment)):
            pack(copy, into)
        sender.send(segment)
    sender.finish()


class BucketTransport:
    """A WeightTransport over a channel."""

    def __init__(self, receiver: Receiver, wire: BucketSpec):
        self._receiver, self._wire = receiver, wire

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        waiting = [(bucket, segments(bucket, self._wire)) for bucket in buckets(copies, self._wire)]
        if waiting:
            self._receiver.expect(waiting[0][1])
        for (bucket, parts), (_, following) in itertools.zip_longest(waiting, waiting[1:], fillvalue=([], [])):
            if following:
                self._receiver.expect(following)
            blocks: dict[int, Iterator[tuple[Copy, torch.Tensor]]] = {}
            for segment in parts:
                blocks[segment.source_rank] = self._wire.blocks(segment.copies, self._receiver.receive(segment))
            for copy in bucket:
                yield next(blocks[copy.source_rank])
            for segment in parts:
                self._receiver.release(segment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._receiver.close()


def _cut(copy: Copy, most_elements: int, axis: int = 0) -> Iterator[Copy]:
    """The copy in parts of at most ``most_elements``, cut from ``axis`` on."""
    shape = copy.source.shape
    if copy.source.elements <= most_elements or axis == len(shape):
        yield copy
        return
    step = max(1, most_elements // math.prod(shape[axis + 1 :]))
    for first in range(0, shape[axis], step):
        start = tuple(first if i == axis else 0 for i in range(len(shape)))
        extent = (*shape[:axis], min(step, shape[axis] - first), *shape[axis + 1 :])
        yield from _cut(copy.part(Box(start, extent)), most_elements, axis + 1)
