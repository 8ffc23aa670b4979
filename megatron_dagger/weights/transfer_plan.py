"""The plan: which rank of the trainer sends which block of which tensor to which rank of the engine.

Pure Python, on shapes alone: no engine is imported and no weight read. Invariants, which the tests
check over the matrix of layouts:

- every element of every parameter of every target rank is written exactly once, by a copy, or by a
  fill where it is vocabulary padding;
- so the bytes moved are the fewest possible: what the targets hold, less their padding;
- ranks that hold the same data take turns as sources: each share of a tensor goes to a target from
  the one that has sent the least so far;
- nothing is skipped: a canonical tensor that only one side has is an error that names it.

Names are global on both sides. The experts of a layer are one tensor with a leading dimension of the
rank's own experts: on the source it stands for the tensors that its name (``…linear_fc1.weight{}``)
gives for each local expert; on the target it is vLLM's stacked parameter.
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
from megatron_dagger.weights.families.megatron_tensor import Layout
from megatron_dagger.weights.families.vllm_tensor import Parameter
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
        """What it copies of ``inside``, a box of its block."""
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

    ``minimum_elements``: the elements of all target parameters, less their padding.
    """

    copies: tuple[Copy, ...]
    fills: tuple[Fill, ...]
    minimum_elements: int

    @cached_property
    def by_source(self) -> dict[int, list[Copy]]:
        """What each source rank sends; ranks that send nothing are missing."""
        return _grouped((copy.source_rank, copy) for copy in self.copies)

    @cached_property
    def by_target(self) -> dict[int, list[Copy]]:
        """What each target rank receives."""
        return _grouped((copy.target_rank, copy) for copy in self.copies)

    @cached_property
    def elements_moved(self) -> int:
        return sum(copy.source.elements for copy in self.copies)

    def bytes_moved(self, itemsize: int) -> int:
        """What all copies move together, at ``itemsize`` bytes an element."""
        return self.elements_moved * itemsize

    def minimum_bytes(self, itemsize: int) -> int:
        """The fewest bytes that any plan could move."""
        return self.minimum_elements * itemsize


def plan(
    model: ModelConfig, source: SourceLayout, target: TargetLayout, quantization: Quantization = "none"
) -> TransferPlan:
    """TransferPlan the way of all weights of ``model`` from the trainer's ranks to the engine's.

    With a ``quantization`` the engine's linear layers have scales, and the source ranks tables of them.

    Raises ConfigError or WeightMapError, with the setting or the tensor by name, if one side cannot
    hold the model in its layout or the two sides are not made of the same tensors.
    """
    source.check_model(model)
    target.check_model(model)
    holdings = _Holdings(model, source, quantization)
    sent = [0] * source.world_size
    copies: list[Copy] = []
    fills: list[Fill] = []
    minimum = 0
    table = vllm_table(model, quantization)
    for name, parameter in table.items():
        held = holdings.take(parameter)
        for shard, ranks in target.holders(experts=parameter.experts > 0):
            if scales_name(name) in table:
                check_whole_blocks(name, parameter, shard)
            wanted, padding = parameter.blocks(shard), parameter.padding(shard)
            elements = math.prod(parameter.shape(shard)) - (padding.elements if padding else 0)
            minimum += elements * len(ranks)
            found = [(holding, _overlaps(holding.blocks, wanted)) for holding in held]
            for rank in ranks:
                for holding, pairs in found:
                    copies += _copies(holding, pairs, sent, rank, name)
                if padding:
                    fills.append(Fill(target_rank=rank, target_parameter=name, target=padding))
    holdings.check_all_taken()
    return TransferPlan(copies=tuple(copies), fills=tuple(fills), minimum_elements=minimum)


@dataclass(frozen=True, slots=True)
class _Holding:
    """Blocks that several ranks hold alike, each in a tensor of its own: ``(rank, tensor)``."""

    blocks: list[Block]
    owners: list[tuple[int, str]]


class _Holdings:
    """What the source ranks hold, to be taken parameter by parameter."""

    def __init__(self, model: ModelConfig, source: SourceLayout, quantization: Quantization):
        self._model, self._source = model, source
        self._megatron = megatron_table(model, quantization)
        self._left = {part.name: name for name, layout in self._megatron.items() for part in layout.parts}

    def take(self, parameter: Parameter) -> list[_Holding]:
        """The holdings of all canonical tensors that make up ``parameter``."""
        tensors: dict[str, Layout] = {}
        for piece in parameter.pieces:
            name = self._left.pop(piece.name, None)
            if name is None:
                raise WeightMapError(f"{piece.name!r} is not to be had from Megatron's tensors, or is wanted twice")
            tensors[name] = self._megatron[name]
        return [holding for name, layout in tensors.items() for holding in self._of_tensor(name, layout)]

    def check_all_taken(self) -> None:
        if self._left:
            some = ", ".join(f"{name!r} (of {ours!r})" for name, ours in list(self._left.items())[:5])
            raise WeightMapError(f"no parameter of vLLM takes {some}: {len(self._left)} left over")

    def _of_tensor(self, name: str, layout: Layout) -> Iterator[_Holding]:
        source = self._source
        copy = source.tied_copy(self._model) if name == EMBEDDING else None
        last = source.pipeline_model_parallel_size - 1
        copies = [ranks for _, ranks in source.holders(layout, last)] if copy else []
        for i, (shard, ranks) in enumerate(source.holders(layout, source.stage(name, self._model))):
            owners = [(rank, name) for rank in ranks]
            if copy:
                owners += [(rank, copy) for rank in copies[i]]
            yield _Holding(layout.blocks(shard, padded_rows=source.padded_vocab_size), owners)


def _overlaps(held: list[Block], wanted: list[Block]) -> list[tuple[Box, Box]]:
    pairs = (overlap(one, other) for one in held for other in wanted)
    return merge([pair for pair in pairs if pair])


def _copies(
    holding: _Holding, pairs: list[tuple[Box, Box]], sent: list[int], target_rank: int, parameter: str
) -> list[Copy]:
    """The copies of one holding to one target rank, all from the owner that has ``sent`` the least."""
    if not pairs:
        return []
    rank, tensor = min(holding.owners, key=lambda owner: sent[owner[0]])
    sent[rank] += sum(here.elements for here, _ in pairs)
    return [
        Copy(
            source_rank=rank,
            source_tensor=tensor,
            source=here,
            target_rank=target_rank,
            target_parameter=parameter,
            target=there,
        )
        for here, there in pairs
    ]


def _within(box: Box, inside: Box) -> Box:
    return Box(tuple(map(sum, zip(box.start, inside.start, strict=True))), inside.shape)


def _grouped(pairs: Iterable[tuple[int, Copy]]) -> dict[int, list[Copy]]:
    groups: dict[int, list[Copy]] = defaultdict(list)
    for rank, copy in pairs:
        groups[rank].append(copy)
    return dict(groups)
