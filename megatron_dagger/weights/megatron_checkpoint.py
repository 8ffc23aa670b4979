"""Reads the weights of a Megatron torch_dist checkpoint, without Megatron, a model or a process group.

Weights only: the index is read by an unpickler that runs no code, the chunks by
``torch.load(weights_only=True)``. At most one layer's tensor is in memory at a time. Whatever
layout the checkpoint was saved under, the canonical tensors come out whole and in the model's order.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.dist_metadata import Chunk, StoredTensor, read_metadata
from megatron_dagger.weights.errors import CheckpointReadError

if TYPE_CHECKING:
    import torch

_LAYERS = "decoder.layers."
_NOT_WEIGHTS = ("optimizer.", "optimizer_state.", "opt_param_scheduler", "rng_state", "rerun_state_machine")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where a Megatron tensor of one layer (or of none) lies: ``stored``, at index ``layer`` of its
    leading dimension if it holds all layers stacked."""

    name: str
    stored: StoredTensor
    layer: int | None


class MegatronCheckpoint:
    """A checkpoint directory, indexed. Opening it reads no weights."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.tensors = read_metadata(self.directory)

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
                expected, shape = layout.shape, _shape(source)
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

    def canonical_tensors(self, model: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every canonical (Hugging Face) tensor of the model, whole, contiguous, on the CPU."""
        for source in self.sources(model):
            for name, tensor in families.to_canonical(source.name, self.read(source), model):
                yield name, tensor.contiguous()

    def read(self, source: Source) -> torch.Tensor:
        """One whole Megatron tensor of one layer, in the dtype it was stored in."""
        import torch

        stored, layer = source.stored, source.layer
        whole: torch.Tensor | None = None
        for chunk in stored.chunks:
            if layer is not None and not 0 <= layer - chunk.offsets[0] < chunk.sizes[0]:
                continue
            block = self._load(chunk, stored)
            offsets, sizes = chunk.offsets, chunk.sizes
            if layer is not None:
                block, offsets, sizes = block[layer - offsets[0]], offsets[1:], sizes[1:]
            if sizes == _shape(source):
                return block
            if whole is None:
                whole = torch.empty(_shape(source), dtype=block.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = block
        assert whole is not None, "the chunks were checked to cover the tensor"
        return whole

    def bytes_stored(self, model: ModelConfig) -> int:
        """The bytes of the model's weights in the files."""
        stored = {source.stored.name: source.stored for source in self.sources(model)}
        return sum(chunk.length for tensor in stored.values() for chunk in tensor.chunks)

    def _unstacked(self) -> Iterator[Source]:
        for name, stored in self.tensors.items():
            if name.startswith(_NOT_WEIGHTS):
                continue
            rest = name.removeprefix(_LAYERS)
            if rest == name or rest.partition(".")[0].isdigit():
                yield Source(name=name, stored=stored, layer=None)
                continue
            for layer in range(stored.shape[0]):
                yield Source(name=f"{_LAYERS}{layer}.{rest}", stored=stored, layer=layer)

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

    def _load(self, chunk: Chunk, stored: StoredTensor) -> torch.Tensor:
        import torch

        path = self.directory / chunk.file
        where = f"{path}: the chunk of {stored.name!r} at byte {chunk.start}"
        try:
            with open(path, "rb") as file:
                file.seek(chunk.start)
                data = file.read(chunk.length)
            if len(data) < chunk.length:
                raise CheckpointReadError(f"{where} is truncated: {len(data)} of {chunk.length} bytes")
            block = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointReadError(f"{where} cannot be read: {error.strerror}") from error
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            if isinstance(error, CheckpointReadError):
                raise
            raise CheckpointReadError(f"{where} is damaged: {error}") from error
        expected = (getattr(torch, stored.dtype), chunk.sizes)
        got = (block.dtype, tuple(block.shape)) if isinstance(block, torch.Tensor) else type(block)
        if got != expected:
            raise CheckpointReadError(f"{where} holds {got}, the index says {expected}")
        return block


def _shape(source: Source) -> tuple[int, ...]:
    return source.stored.shape if source.layer is None else source.stored.shape[1:]


def parameters(model: ModelConfig) -> int:
    """The number of the model's weights."""
    return sum(math.prod(shape) for shape in families.canonical_names(model).values())
