"""Reads the weights of a Megatron torch_dist checkpoint, without Megatron, a model or a process group.

Weights only: index and chunks are read by unpicklers that run no code. Files are mapped into memory, so
that only what is used is read. Whatever layout the checkpoint was saved under, the canonical tensors
come out whole and in the model's order.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import Block, Box, overlap
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.torch_dist.archive import ArchiveError, locate
from megatron_dagger.weights.torch_dist.metadata import Chunk, StoredTensor, read_metadata
from megatron_dagger.weights.torch_dist.stacking import unstack

if TYPE_CHECKING:
    import torch

_OPTIMIZER = ("optimizer.", "optimizer_state.")
_NOT_WEIGHTS = (*_OPTIMIZER, "opt_param_scheduler", "rng_state", "rerun_state_machine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a Megatron tensor lies: in ``stored``, at index ``lead`` of its leading dimensions (``stacking``)."""

    name: str
    stored: StoredTensor
    lead: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[len(self.lead) :]


class MegatronCheckpoint:
    """A checkpoint directory, indexed. Opening it reads no weights."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.tensors = read_metadata(self.directory)
        self._maps: dict[Path, mmap.mmap] = {}
        self._views: dict[tuple[str, Chunk], torch.Tensor] = {}  # a chunk is asked for with every block of it
        self._chunks_of: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}  # by stored name, then ``Source.lead``

    @property
    def has_optimizer(self) -> bool:
        """Whether an optimizer's state lies beside the weights."""
        return any(name.startswith(_OPTIMIZER) for name in self.tensors)

    def sources(self, model: ModelConfig) -> list[Source]:
        """The model's Megatron tensors in the model's order, each with its place.

        Raises CheckpointReadError if one is missing, left over or of another shape, or if a file is
        missing or too short. Reads no weights.
        """
        family = families.lookup(model)
        found: dict[str, Source] = {}
        for source in self._unstacked():
            try:
                layout = family.layout(source.name, model)
                expected, shape = layout.shape, source.shape
                fits = shape == expected or (layout.padded and shape[1:] == expected[1:] and shape[0] > expected[0])
                if not fits:
                    raise families.WeightMapError(
                        f"Megatron tensor {source.name!r} has shape {shape}, the model's settings give {expected}"
                    )
            except families.WeightMapError as error:
                raise CheckpointReadError(f"{self.directory} is of another model: {error}") from None
            first = layout.parts[0].name
            if first in found:
                raise CheckpointReadError(
                    f"{self.directory} has {found[first].name!r} and {source.name!r}, both for {first!r}"
                )
            found[first] = source
        missing = [n for n, x in family.layouts(model).items() if x.parts[0].name not in found]
        if missing:
            raise CheckpointReadError(f"{self.directory} lacks {missing[0]!r} ({len(missing)} missing in all)")
        self._check_files()
        return [found[layout.parts[0].name] for layout in family.layouts(model).values()]

    def source_layout(self, model: ModelConfig) -> SourceLayout:
        """The checkpoint as the source of a plan: one rank that holds everything."""
        embedding = self.sources(model)[0]
        return SourceLayout(padded_vocab_size=embedding.shape[0])

    def canonical_tensors(self, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every canonical (Hugging Face) tensor of the model, whole, contiguous, on the CPU."""
        for source in self.sources(model):
            for name, tensor in families.to_canonical(source.name, self.read(source), model):
                yield name, tensor.contiguous()

    def read(self, source: Source, box: Box | None = None) -> torch.Tensor:
        """One Megatron tensor of one layer, or a box of it, in the dtype it was stored in.

        Where one chunk holds all of it, it is a view of the file: nothing but what is used of it is read.
        """
        import torch

        box = box or Box((0,) * len(source.shape), source.shape)
        parts = list(self.parts(source, box))
        assert parts, "the chunks were checked to cover the tensor"
        if parts[0][0].shape == box.shape:
            return parts[0][1]
        result = torch.empty(box.shape, dtype=parts[0][1].dtype)
        for place, values in parts:
            result[place.slices] = values
        return result

    def parts(self, source: Source, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """A box of a tensor as its chunks have it: each one's part, and where in the box it belongs.

        The values are views of the file.
        """
        wanted, depth = Block(source.name, box, (0,) * len(box.start)), len(source.lead)
        for chunk in self._chunks(source):
            here = Block(source.name, Box(chunk.offsets[depth:], chunk.sizes[depth:]), wanted.start)
            common = overlap(here, wanted)
            if common is not None:
                inner = tuple(index - offset for index, offset in zip(source.lead, chunk.offsets, strict=False))
                yield common[1], self._view(chunk, source.stored)[inner][common[0].slices]

    def bytes_stored(self, model: ModelConfig) -> int:
        """The bytes of the model's weights in the files."""
        stored = {source.stored.name: source.stored for source in self.sources(model)}
        return sum(chunk.length for tensor in stored.values() for chunk in tensor.chunks)

    def _chunks(self, source: Source) -> list[Chunk]:
        """Those that have a part of the tensor; an entry of many layers and experts has very many others."""
        table = self._chunks_of.get(source.stored.name)
        if table is None:
            table = self._chunks_of[source.stored.name] = defaultdict(list)
            for chunk in source.stored.chunks:
                ranges = [range(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
                for lead in itertools.product(*ranges[: len(source.lead)]):
                    table[lead].append(chunk)
        return table[source.lead]

    def _unstacked(self) -> Iterator[Source]:
        for stored in self.tensors.values():
            if not stored.name.startswith(_NOT_WEIGHTS):
                for name, lead in unstack(stored.name, stored.shape):
                    yield Source(name=name, stored=stored, lead=lead)

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for stored in self.tensors.values():
            for chunk in stored.chunks:
                ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
        for file, end in ends.items():
            path = self.directory / file
            if not path.is_file():
                raise CheckpointReadError(f"{path} is missing from the checkpoint")
            if path.stat().st_size < end:
                raise CheckpointReadError(
                    f"{path} is truncated: {path.stat().st_size} bytes, the index speaks of {end}"
                )

    def _view(self, chunk: Chunk, stored: StoredTensor) -> torch.Tensor:
        """A chunk's values as they lie in the file; they are read when they are used."""
        key = (stored.name, chunk)
        if key not in self._views:
            self._views[key] = self._located(chunk, stored)
        return self._views[key]

    def _located(self, chunk: Chunk, stored: StoredTensor) -> torch.Tensor:
        import torch

        path = self.directory / chunk.file
        where = f"{path}: the chunk of {stored.name!r} at byte {chunk.start}"
        try:
            memory = self._mapped(path)
            if len(memory) < chunk.start + chunk.length:
                raise CheckpointReadError(f"{where} is truncated: {len(memory) - chunk.start} of {chunk.length} bytes")
            found = locate(cast(BinaryIO, _Window(memory, chunk.start, chunk.length)))
        except OSError as error:
            raise CheckpointReadError(f"{where} cannot be read: {error.strerror}") from error
        except ArchiveError as error:
            raise CheckpointReadError(f"{where} is damaged: {error}") from error
        if (found.dtype, found.shape) != (stored.dtype, chunk.sizes):
            raise CheckpointReadError(
                f"{where} holds {found.dtype} {found.shape}, the index says {stored.dtype} {chunk.sizes}"
            )
        dtype, count = getattr(torch, stored.dtype), math.prod(chunk.sizes)
        if found.start + count * dtype.itemsize > chunk.length:
            raise CheckpointReadError(f"{where} is damaged: its values end behind it")
        if count == 0:
            return torch.empty(chunk.sizes, dtype=dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=chunk.start + found.start)
        return flat.view(chunk.sizes)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


class _Window(io.RawIOBase):
    """Some bytes of a map as a file."""

    def __init__(self, memory: mmap.mmap, start: int, length: int):
        self._memory, self._start, self._length, self._at = memory, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        first = self._start + self._at
        self._at += count
        return self._memory[first : first + count]


def parameters(model: ModelConfig) -> int:
    """The number of the model's weights."""
    return sum(math.prod(shape) for shape in families.canonical_names(model).values())
