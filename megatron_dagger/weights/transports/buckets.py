"""Buckets: the copies of a plan in portions of bounded size, the same ones at both ends.

A target rank's copies go, in their order, into buckets of at most ``bucket_bytes``; what a bucket holds
of one source rank is a segment, which is sent as one. A source sends its segments by bucket number, then
target rank. So both ends know what comes next, nobody waits in a circle, and with two buffers at each
end one bucket travels while another is packed or taken in.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, Self

from megatron_dagger.weights.blocks import Box
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.plan import Copy, Plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What one bucket of a target rank holds of one source rank: its copies lie there without gaps."""

    source_rank: int
    target_rank: int
    copies: tuple[Copy, ...]
    elements: int


class Sender(Protocol):
    """A source rank's end of a channel."""

    def buffer(self, segment: Segment) -> torch.Tensor:
        """Where to put the segment, once there is room: (elements,), of the wire's dtype."""
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
        """The segment, (elements,), once it is there; valid until ``release``."""
        ...

    def release(self, segment: Segment) -> None:
        """It is not needed any more."""
        ...

    def close(self) -> None: ...


def buckets(copies: Sequence[Copy], most_elements: int) -> list[list[Copy]]:
    """A target rank's copies in buckets; what is larger than a bucket is cut along its first dimensions."""
    found: list[list[Copy]] = []
    room = 0
    for copy in cut(copies, most_elements):
        if copy.source.elements > room:
            found.append([])
            room = most_elements
        found[-1].append(copy)
        room -= copy.source.elements
    return found


def cut(copies: Iterable[Copy], most_elements: int) -> Iterator[Copy]:
    """The copies, those of more than ``most_elements`` in parts."""
    return itertools.chain.from_iterable(_cut(copy, most_elements) for copy in copies)


def segments(bucket: Sequence[Copy]) -> list[Segment]:
    """The segments of a bucket, by source rank."""
    by_source: dict[int, list[Copy]] = {}
    for copy in bucket:
        by_source.setdefault(copy.source_rank, []).append(copy)
    return [
        Segment(
            source_rank=rank,
            target_rank=copies[0].target_rank,
            copies=tuple(copies),
            elements=sum(copy.source.elements for copy in copies),
        )
        for rank, copies in sorted(by_source.items())
    ]


def outgoing(plan: Plan, source_rank: int, most_elements: int) -> Iterator[Segment]:
    """What a source rank sends, in its order."""
    by_target = [buckets(copies, most_elements) for _, copies in sorted(plan.by_target.items())]
    for row in itertools.zip_longest(*by_target):
        for bucket in filter(None, row):
            yield from (segment for segment in segments(bucket) if segment.source_rank == source_rank)


def send(plan: Plan, source_rank: int, tensors: Mapping[str, torch.Tensor], sender: Sender, most_elements: int) -> None:
    """Send all that the plan wants of this source rank's ``tensors``, by their global Megatron names.

    A name that stands for a layer's experts (``…{}``) is looked up for each local one. Values are cast to
    the wire's dtype.
    """
    for segment in outgoing(plan, source_rank, most_elements):
        buffer = sender.buffer(segment)
        start = 0
        for copy in segment.copies:
            _pack(copy, tensors, buffer[start : start + copy.source.elements].view(copy.source.shape))
            start += copy.source.elements
        sender.send(segment)
    sender.finish()


class BucketTransport:
    """A WeightTransport over a channel."""

    def __init__(self, receiver: Receiver, most_elements: int):
        self._receiver = receiver
        self._most_elements = most_elements

    def receive(self, copies: Sequence[Copy]) -> Iterator[tuple[Copy, torch.Tensor]]:
        waiting = [(bucket, segments(bucket)) for bucket in buckets(copies, self._most_elements)]
        if waiting:
            self._receiver.expect(waiting[0][1])
        for (bucket, parts), (_, following) in itertools.zip_longest(waiting, waiting[1:], fillvalue=([], [])):
            if following:
                self._receiver.expect(following)
            blocks: dict[int, Iterator[torch.Tensor]] = {}
            for segment in parts:
                blocks[segment.source_rank] = _unpack(segment, self._receiver.receive(segment))
            for copy in bucket:
                yield copy, next(blocks[copy.source_rank])
            for segment in parts:
                self._receiver.release(segment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._receiver.close()


def _unpack(segment: Segment, data: torch.Tensor) -> Iterator[torch.Tensor]:
    start = 0
    for copy in segment.copies:
        yield data[start : start + copy.source.elements].view(copy.source.shape)
        start += copy.source.elements


def _pack(copy: Copy, tensors: Mapping[str, torch.Tensor], into: torch.Tensor) -> None:
    name, box = copy.source_tensor, copy.source
    try:
        if "{}" not in name:
            into.copy_(tensors[name][box.slices])
            return
        for place, local in enumerate(range(box.start[0], box.start[0] + box.shape[0])):
            into[place].copy_(tensors[name.format(local)][box.slices[1:]])
    except KeyError as error:
        raise WeightSyncError(f"source rank {copy.source_rank} has no tensor {error.args[0]!r}") from None


def _cut(copy: Copy, most_elements: int, axis: int = 0) -> Iterator[Copy]:
    """The copy in parts of at most ``most_elements``, cut from ``axis`` on."""
    shape = copy.source.shape
    if copy.source.elements <= most_elements or axis == len(shape):
        yield copy
        return
    step = max(1, most_elements // math.prod(shape[axis + 1 :]))
    for first in range(0, shape[axis], step):
        yield from _cut(_part(copy, axis, first, min(step, shape[axis] - first)), most_elements, axis + 1)


def _part(copy: Copy, axis: int, first: int, extent: int) -> Copy:
    def part(box: Box) -> Box:
        start, shape = list(box.start), list(box.shape)
        start[axis] += first
        shape[axis] = extent
        return Box(tuple(start), tuple(shape))

    return replace(copy, source=part(copy.source), target=part(copy.target))
