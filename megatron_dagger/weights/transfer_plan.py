"""Plans a transfer: which rank of the trainer sends which block of which tensor to which rank of the engine.

Pure Python on shapes: no engine is imported and no weight is read. Invariants, which the tests check over the matrix of
layouts:

- every element of every parameter on every target rank is written exactly once: by a copy, or by a fill if it is
  vocabulary padding;
- therefore the bytes moved are the minimum: the targets' parameters without their padding;
- ranks that hold the same shard take turns: each target's part of a shard comes from the holder that has sent least;
- nothing is skipped: a canonical tensor that only one side has is an error that names it.

Names are global on both sides. The experts of a layer are a single tensor whose leading dimension counts the rank's own
experts. On the source it stands for one tensor per local expert, named by filling the number into
``…linear_fc1.weight{}``; on the target it is vLLM's stacked parameter.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, Box, merge, overlap
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families.decoder import EMBEDDING
from megatron_dagger.weights.families.fp8 import (
    Quantization,
    check_whole_blocks,
    megatron_table,
    scales_name,
    vllm_table,
)
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor
from megatron_dagger.weights.families.vllm_tensor import VllmTensor
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A block of a source rank's own tensor, and the block of a target rank's parameter that it fills.

    Both boxes have the same shape.
    """

    source_rank: int
    source_tensor: str
    source: Box
    target_rank: int
    target_parameter: str
    target: Box

    def part(self, inside: Box) -> Copy:
        """Return the copy of ``inside``, a box relative to the copied block."""
        return replace(self, source=_within(self.source, inside), target=_within(self.target, inside))


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """A block of a target rank's parameter that is set to zero."""

    target_rank: int
    target_parameter: str
    target: Box


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """All copies and fills, in the order of vLLM's parameters.

    ``minimum_elements``: the elements of all target parameters without their padding.
    """

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    minimum_elements: int

    @cached_property
    def by_source(self) -> dict[int, list[Copy]]:
        """The copies that each source rank sends. Ranks that send nothing are missing."""
        return _grouped((copy.source_rank, copy) for copy in self.copies)

    @cached_property
    def by_target(self) -> dict[int, list[Copy]]:
        """The copies that each target rank receives."""
        return _grouped((copy.target_rank, copy) for copy in self.copies)

    @cached_property
    def elements_moved(self) -> int:
        return sum(copy.source.elements for copy in self.copies)

    def bytes_moved(self, itemsize: int) -> int:
        """Return the bytes of all copies, at ``itemsize`` bytes per element."""
        return self.elements_moved * itemsize

    def minimum_bytes(self, itemsize: int) -> int:
        """Return the fewest bytes that any plan could move."""
        return self.minimum_elements * itemsize


def plan(
    model: ModelConfig, source: SourceLayout, target: TargetLayout, quantization: Quantization = "none"
) -> TransferPlan:
    """Plan the transfer of all weights of ``model`` from the trainer's ranks to the engine's.

    With a ``quantization`` the engine's linear layers have scales, which every source rank holds whole.

    Raises ConfigError or WeightMapError, naming the setting or the tensor, if a side cannot hold the model in its
    layout or the sides do not have the same canonical tensors.
    """
    source.check_model(model)
    target.check_model(model)
    sources, balancer = _SourceShards(model, source, quantization), _Balancer()
    copies: list[Copy] = []
    fills: list[Fill] = []
    minimum = 0
    table = vllm_table(model, quantization)
    for name, parameter in table.items():
        source_shards = sources.take(parameter)
        for shard, ranks in target.holders(experts=parameter.experts > 0):
            if scales_name(name) in table:
                check_whole_blocks(name, parameter, shard)
            blocks, padding = parameter.blocks(shard), parameter.padding(shard)
            elements = math.prod(parameter.shape(shard)) - (padding.elements if padding else 0)
            minimum += elements * len(ranks)
            overlaps = [(held, _overlaps(held.blocks, blocks)) for held in source_shards]
            for rank in ranks:
                for held, boxes in overlaps:
                    if not boxes:
                        continue
                    source_rank, tensor = balancer.choose(held, sum(box.elements for box, _ in boxes))
                    copies += [
                        Copy(
                            source_rank=source_rank,
                            source_tensor=tensor,
                            source=source_box,
                            target_rank=rank,
                            target_parameter=name,
                            target=target_box,
                        )
                        for source_box, target_box in boxes
                    ]
                if padding:
                    fills.append(Fill(target_rank=rank, target_parameter=name, target=padding))
    sources.check_all_taken()
    return TransferPlan(copies=tuple(copies), fills=tuple(fills), minimum_elements=minimum)


@dataclass(frozen=True, slots=True)
class _SourceShard:
    """A shard of a Megatron tensor: its blocks, and every ``(rank, tensor name)`` that holds them."""

    blocks: list[Block]
    holders: list[tuple[int, str]]


class _SourceShards:
    """The shards on the source ranks. Each canonical tensor is taken by exactly one parameter of the engine."""

    def __init__(self, model: ModelConfig, source: SourceLayout, quantization: Quantization):
        self._model, self._source = model, source
        self._megatron = megatron_table(model, quantization)
        self._untaken = {part.name: name for name, entry in self._megatron.items() for part in entry.parts}

    def take(self, parameter: VllmTensor) -> list[_SourceShard]:
        """Return the shards of all canonical tensors in ``parameter``."""
        tensors: dict[str, MegatronTensor] = {}
        for part in parameter.parts:
            name = self._untaken.pop(part.name, None)
            if name is None:
                raise WeightMapError(f"{part.name!r} is in none of Megatron's tensors, or in two of vLLM's parameters")
            tensors[name] = self._megatron[name]
        return [shard for name, entry in tensors.items() for shard in self._shards_of(name, entry)]

    def check_all_taken(self) -> None:
        """Raise WeightMapError if a canonical tensor is in none of the engine's parameters."""
        if self._untaken:
            some = ", ".join(f"{name!r} (of {mcore!r})" for name, mcore in list(self._untaken.items())[:5])
            raise WeightMapError(f"none of vLLM's parameters takes {some}: {len(self._untaken)} left over")

    def _shards_of(self, name: str, entry: MegatronTensor) -> Iterator[_SourceShard]:
        source = self._source
        tied_copy = source.tied_copy(self._model) if name == EMBEDDING else None
        last = source.pipeline_model_parallel_size - 1
        copy_ranks = [ranks for _, ranks in source.holders(entry, last)] if tied_copy else []
        for i, (shard, ranks) in enumerate(source.holders(entry, source.stage(name, self._model))):
            holders = [(rank, name) for rank in ranks]
            if tied_copy:
                holders += [(rank, tied_copy) for rank in copy_ranks[i]]
            yield _SourceShard(entry.blocks(shard, padded_rows=source.padded_vocab_size), holders)


class _Balancer:
    """Spreads the transfer over ranks that hold the same shard."""

    def __init__(self) -> None:
        self._sent: defaultdict[int, int] = defaultdict(int)  # elements, by source rank

    def choose(self, shard: _SourceShard, elements: int) -> tuple[int, str]:
        """Return the holder of ``shard`` that has sent least so far, which is to send ``elements`` more."""
        rank, tensor = min(shard.holders, key=lambda holder: self._sent[holder[0]])
        self._sent[rank] += elements
        return rank, tensor


def _overlaps(source: list[Block], target: list[Block]) -> list[tuple[Box, Box]]:
    """Return the boxes of the source rank's tensor and of the target rank's parameter that hold the same elements."""
    pairs = (overlap(held, needed) for held in source for needed in target)
    return merge([pair for pair in pairs if pair])


def _within(box: Box, inside: Box) -> Box:
    return Box(tuple(map(sum, zip(box.start, inside.start, strict=True))), inside.shape)


def _grouped(pairs: Iterable[tuple[int, Copy]]) -> dict[int, list[Copy]]:
    groups: dict[int, list[Copy]] = defaultdict(list)
    for rank, copy in pairs:
        groups[rank].append(copy)
    return dict(groups)
