"""The geometry of sharded weights: which blocks of a canonical tensor a rank holds, and where.

Both sides describe a rank's own tensor as blocks of canonical (Hugging Face) tensors: Megatron's in
``families/megatron_tensor.py``, vLLM's in ``families/vllm_tensor.py``. The data that a rank of one side sends to a
rank of the other is the overlap of their blocks in canonical coordinates. Tensors have one dimension (norms, biases),
two (matrices), or three where a layer's experts are stacked: experts, rows, columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from megatron_dagger.weights.errors import WeightMapError

Index = tuple[int, ...]
# Bytes per element, by torch's name of the dtype.
ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
Span = tuple[int, int]  # start and extent along one dimension


class ShardDim(Enum):
    """The dimension along which tensor parallelism splits a tensor into equal shards."""

    NONE = "none"  # replicated on every rank
    ROWS = "rows"  # the rows of each canonical tensor in it
    GROUPS = "groups"  # the rows, between query groups only
    COLUMNS = "columns"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rank's shard of a tensor: ``rank`` of ``size`` tensor-parallel ranks, and the same for the experts."""

    rank: int = 0
    size: int = 1
    expert_rank: int = 0
    expert_size: int = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A block of a tensor: its first index and its extent in every dimension."""

    start: Index
    shape: Index

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Return the index of the block in an array."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Block:
    """The box ``canonical`` of the canonical tensor ``name``, which a rank's own tensor holds at index ``start``."""

    name: str
    canonical: Box
    start: Index

    @classmethod
    def of(cls, name: str, rows: Span, row: int, columns: Span | None, experts: Span | None) -> Block:
        """Return the block of these experts, ``rows`` and ``columns``, held by the rank from ``row`` on.

        None stands for a dimension that the tensor does not have.
        """
        spans = [span for span in (experts, rows, columns) if span]
        start = [0] * len(spans)
        start[1 if experts else 0] = row
        return cls(name, Box(tuple(s for s, _ in spans), tuple(n for _, n in spans)), tuple(start))


def overlap(a: Block, b: Block) -> tuple[Box, Box] | None:
    """Return the overlap of two ranks' blocks as a box of each rank's own tensor, or None if they do not overlap."""
    if a.name != b.name:
        return None
    starts_in_a, starts_in_b, shape = [], [], []
    for axis, (first_of_a, first_of_b) in enumerate(zip(a.canonical.start, b.canonical.start, strict=True)):
        start = max(first_of_a, first_of_b)
        extent = min(first_of_a + a.canonical.shape[axis], first_of_b + b.canonical.shape[axis]) - start
        if extent <= 0:
            return None
        starts_in_a.append(a.start[axis] + start - first_of_a)
        starts_in_b.append(b.start[axis] + start - first_of_b)
        shape.append(extent)
    return Box(tuple(starts_in_a), tuple(shape)), Box(tuple(starts_in_b), tuple(shape))


def merge(pairs: list[tuple[Box, Box]]) -> list[tuple[Box, Box]]:
    """Join the pairs whose rows are adjacent on both sides (gate and up, K and V, …)."""
    merged: list[tuple[Box, Box]] = []
    for pair in sorted(pairs, key=lambda pair: pair[0].start):
        if merged and all(_follows(next_, last) for last, next_ in zip(merged[-1], pair, strict=True)):
            pair = (_joined(merged[-1][0], pair[0]), _joined(merged[-1][1], pair[1]))
            merged.pop()
        merged.append(pair)
    return merged


def share(total: int, rank: int, size: int, what: str) -> Span:
    """Return the rank's equal share of ``total`` units. Raises WeightMapError, naming ``what``, if they are unequal."""
    if total % size:
        raise WeightMapError(f"{what}: {total} cannot be split into {size} equal shares")
    extent = total // size
    return rank * extent, extent


def _row_axis(box: Box) -> int:
    return max(0, len(box.shape) - 2)


def _follows(box: Box, last: Box) -> bool:
    axis = _row_axis(box)
    same = all(
        box.start[i] == last.start[i] and box.shape[i] == last.shape[i] for i in range(len(box.shape)) if i != axis
    )
    return same and box.start[axis] == last.start[axis] + last.shape[axis]


def _joined(last: Box, box: Box) -> Box:
    axis = _row_axis(box)
    rows = last.shape[axis] + box.shape[axis]
    return Box(last.start, (*last.shape[:axis], rows, *last.shape[axis + 1 :]))
