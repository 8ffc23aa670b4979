"""Reads the weights of a Megatron torch_dist checkpoint, without Megatron, a model or a process group.

The index and the chunks are read by unpicklers that run no code. Files are mapped into memory, so only the parts in use
are read. The canonical tensors are whole and in the model's order, whatever layout the checkpoint was saved under.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import re
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

_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer(_state)?\.")  # chained: one for dense weights, one for experts
_NOT_WEIGHTS = re.compile(rf"{_OPTIMIZER.pattern}|opt_param_scheduler|rng_state|rerun_state_machine")
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The place of a Megatron tensor: index ``lead`` in the leading dimensions of ``stored`` (``stacking.py``)."""

    name: str
    stored: StoredTensor
    lead: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[len(self.lead) :]


class MegatronCheckpoint:
    """An indexed checkpoint directory. Opening it reads no weights."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.tensors = read_metadata(self.directory)
        self._maps: dict[Path, mmap.mmap] = {}
        self._views: dict[tuple[str, Chunk], torch.Tensor] = {}  # kept, since every block of a chunk needs its view
        self._chunks_of: dict[str, dict[tuple[int, ...], list[Chunk]]] = {}  # by stored name, then ``Source.lead``

    @property
    def has_optimizer(self) -> bool:
        """Whether the checkpoint contains an optimizer's state."""
        return any(map(_OPTIMIZER.match, self.tensors))

    def sources(self, model: ModelConfig) -> list[Source]:
        """Return the model's Megatron tensors with their places, in the model's order. Reads no weights.

        Raises CheckpointReadError if a tensor is missing, unknown or of another shape, or if a file is missing or too
        short.
        """
        weight_map = families.lookup(model)
        sources: dict[str, Source] = {}  # by the tensor's first canonical name
        for source in self._unstacked():
            try:
                entry = weight_map.megatron_tensor(source.name, model)
                expected, shape = entry.shape, source.shape
                fits = shape == expected or (entry.padded and shape[1:] == expected[1:] and shape[0] > expected[0])
                if not fits:
                    raise families.WeightMapError(
                        f"Megatron tensor {source.name!r} has shape {shape}, but the model's settings give {expected}"
                    )
            except families.WeightMapError as error:
                raise CheckpointReadError(f"{self.directory} is of another model: {error}") from None
            first = entry.parts[0].name
            if first in sources:
                raise CheckpointReadError(
                    f"{self.directory} has {sources[first].name!r} and {source.name!r}, both for {first!r}"
                )
            sources[first] = source
        table = weight_map.megatron_tensors(model)
        missing = [name for name, entry in table.items() if entry.parts[0].name not in sources]
        if missing:
            raise CheckpointReadError(f"{self.directory} lacks {missing[0]!r} ({len(missing)} missing in all)")
        self._check_files()
        return [sources[entry.parts[0].name] for entry in table.values()]

    def source_layout(self, model: ModelConfig) -> SourceLayout:
        """Return the layout of a plan's source for this checkpoint: a single rank that holds everything."""
        embedding = self.sources(model)[0]
        return SourceLayout(padded_vocab_size=embedding.shape[0])

    def canonical_tensors(self, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for every canonical (Hugging Face) tensor: whole, contiguous, on the CPU."""
        for source in self.sources(model):
            for name, tensor in families.to_canonical(source.name, self.read(source), model):
                yield name, tensor.contiguous()

    def read(self, source: Source, box: Box | None = None) -> torch.Tensor:
        """Return a Megatron tensor of a single layer, or a box of it, in the stored dtype.

        If a single chunk holds all of it, the result is a view of the file, which is read on use. Raises
        CheckpointReadError if the chunks do not cover it.
        """
        import torch

        box = box or Box((0,) * len(source.shape), source.shape)
        parts = list(self.parts(source, box))
        if sum(part.elements for part, _ in parts) != box.elements:
            raise CheckpointReadError(f"{self.directory}: the stored chunks do not cover {source.name!r}")
        if parts[0][0].shape == box.shape:
            return parts[0][1]
        result = torch.empty(box.shape, dtype=parts[0][1].dtype)
        for part, values in parts:
            result[part.slices] = values
        return result

    def parts(self, source: Source, box: Box) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield (part, values) for each chunk that overlaps a box of a tensor. ``part`` is relative to the box.

        The values are views of the file.
        """
        requested, depth = Block(source.name, box, (0,) * len(box.start)), len(source.lead)
        for chunk in self._chunks(source):
            stored = Block(source.name, Box(chunk.offsets[depth:], chunk.sizes[depth:]), requested.start)
            common = overlap(stored, requested)
            if common is not None:
                inner = tuple(index - offset for index, offset in zip(source.lead, chunk.offsets, strict=False))
                yield common[1], self._view(chunk, source.stored)[inner][common[0].slices]

    def bytes_stored(self, model: ModelConfig) -> int:
        """Return the bytes that the model's weights take up in the files."""
        stored = {source.stored.name: source.stored for source in self.sources(model)}
        return sum(chunk.length for tensor in stored.values() for chunk in tensor.chunks)

    def _chunks(self, source: Source) -> list[Chunk]:
        """Return the chunks that hold a part of the tensor.

        An entry of many layers and experts has very many chunks, so they are indexed on the first call.
        """
        table = self._chunks_of.get(source.stored.name)
        if table is None:
            table = self._chunks_of[source.stored.name] = defaultdict(list)
            for chunk in source.stored.chunks:
                ranges = [range(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True)]
                for lead in itertools.product(*ranges[: len(source.lead)]):
                    table[lead].append(chunk)
        return table[source.lead]

    def _unstacked(self) -> Iterator[Source]:
        """Yield the model's tensors; some programs put ``module.`` before all names."""
        weights = {name: stored for name, stored in self.tensors.items() if not _NOT_WEIGHTS.match(name)}
        embedding = next((name for name in weights if name.endswith(f".{_EMBEDDING}")), _EMBEDDING)
        prefix = embedding.removesuffix(_EMBEDDING)
        for name, stored in weights.items():
            for unstacked, lead in unstack(name.removeprefix(prefix), stored.shape):
                yield Source(name=unstacked, stored=stored, lead=lead)

    def _check_files(self) -> None:
        """Raise CheckpointReadError if a file is missing or shorter than its chunks."""
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
                    f"{path} is truncated: {path.stat().st_size} bytes, but the index refers to {end}"
                )

    def _view(self, chunk: Chunk, stored: StoredTensor) -> torch.Tensor:
        """Return a chunk's values as a view of the file, which is read on use."""
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
            archived = locate(cast(BinaryIO, _Window(memory, chunk.start, chunk.length)))
        except OSError as error:
            raise CheckpointReadError(f"{where} cannot be read: {error.strerror}") from error
        except ArchiveError as error:
            raise CheckpointReadError(f"{where} is damaged: {error}") from error
        if (archived.dtype, archived.shape) != (stored.dtype, chunk.sizes):
            raise CheckpointReadError(
                f"{where} holds {archived.dtype} {archived.shape}, but the index says {stored.dtype} {chunk.sizes}"
            )
        dtype, count = getattr(torch, stored.dtype), math.prod(chunk.sizes)
        if archived.start + count * dtype.itemsize > chunk.length:
            raise CheckpointReadError(f"{where} is damaged: its values exceed the chunk")
        if count == 0:
            return torch.empty(chunk.sizes, dtype=dtype)
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=chunk.start + archived.start)
        return flat.view(chunk.sizes)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open(path, "rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


class _Window(io.RawIOBase):
    """A range of a memory map as a file."""

    def __init__(self, memory: mmap.mmap, start: int, length: int):
        self._memory, self._start, self._length, self._position = memory, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._length)[whence]
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        remaining = max(0, self._length - self._position)
        count = remaining if size is None or size < 0 else min(size, remaining)
        first = self._start + self._position
        self._position += count
        return self._memory[first : first + count]
