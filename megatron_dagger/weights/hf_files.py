"""Hugging Face checkpoints: safetensors files with an index, read and written tensor by tensor.

Only requested tensors are read. All sizes are known before writing, so a file's header is written first and then its
tensors, with no more than one in memory. A file gets its name when it is complete; an interrupted conversion resumes
with the first missing file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.store import atomic
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import ITEMSIZE
from megatron_dagger.weights.companions import CONFIG, INDEX, read_config
from megatron_dagger.weights.errors import CheckpointReadError
from megatron_dagger.weights.hf_index import SINGLE, StoredTensors

if TYPE_CHECKING:
    import torch

_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TORCH_NAMES = {stored: name for name, stored in _DTYPES.items()}
_TIED_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Read = Callable[[str], "torch.Tensor"]
Dtypes = Callable[[str], str]  # torch's name of a canonical tensor's dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A tensor to be written; ``dtype`` is torch's name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class HfCheckpoint:
    """A directory with config.json and safetensors files.

    Raises CheckpointReadError if a file is missing or damaged, or belongs to another model.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        self.model = ModelConfig.from_hf(read_config(self.directory / CONFIG))
        self._tensors = StoredTensors(self.directory)
        if self.model.tie_embeddings and _TIED_HEAD in self._tensors:
            self._drop_tied_head()
        try:
            families.lookup(self.model).check_complete(self._tensors.names(), self.model)
        except families.WeightMapError as error:
            raise CheckpointReadError(f"{directory}: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        """Return a canonical tensor in its stored dtype."""
        tensor: torch.Tensor = self._tensors.read(name)
        expected = families.canonical_names(self.model)[name]
        if tuple(tensor.shape) != expected:
            raise CheckpointReadError(f"{self._tensors.file(name)}: {name!r} is {tuple(tensor.shape)}, not {expected}")
        return tensor

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for every tensor, in the model's order."""
        for name in families.canonical_names(self.model):
            yield name, self.read(name)

    def dtype(self, name: str = _EMBEDDING) -> str:
        """Return torch's name of a tensor's dtype. Raises CheckpointReadError if it is quantised, or no float."""
        stored = self._tensors.dtype(name)
        if stored not in _TORCH_NAMES:
            raise CheckpointReadError(f"{self._tensors.file(name)}: {name!r} is stored as {stored}, which is not read")
        return _TORCH_NAMES[stored]

    def _drop_tied_head(self) -> None:
        """Drop a stored output layer that is equal to the tied embedding. Raises CheckpointReadError if it differs."""
        import torch

        if not torch.equal(self._tensors.read(_TIED_HEAD), self._tensors.read(_EMBEDDING)):
            raise CheckpointReadError(
                f"{self.directory} has tie_word_embeddings, but {_TIED_HEAD} differs from {_EMBEDDING}: "
                "set tie_word_embeddings to false"
            )
        self._tensors.drop(_TIED_HEAD)


def write_hf(
    directory: Path,
    model: ModelConfig,
    read: Read,
    dtype: str | Dtypes,
    *,
    max_bytes: int = 5 << 30,
    entries: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and the safetensors files of ``model`` into ``directory``, resuming an interrupted call.

    Files already in ``directory`` must be of the same weights and arguments, which ``store.resumable`` ensures.
    ``read(name)`` returns a canonical tensor, which is cast to ``dtype``: torch's name, or a function of the tensor's
    name. No file exceeds ``max_bytes`` by more than its header, unless a single tensor does. ``entries`` are further
    ones for config.json. The index is written last.
    """
    dtypes = dtype if callable(dtype) else lambda name: dtype
    tensors = {name: Layout(shape=shape, dtype=dtypes(name)) for name, shape in families.canonical_names(model).items()}
    files = _group_by_file([(name, layout.bytes) for name, layout in tensors.items()], max_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE]
    for file, group in zip(names, files, strict=True):
        if not (directory / file).exists():
            _write_file(directory / file, {name: tensors[name] for name in group}, read)
    written = {"torch_dtype": tensors[_EMBEDDING].dtype, **(entries or {})}
    atomic.write_json(directory / CONFIG, model.hf_config() | written)
    if len(files) > 1:
        total = sum(layout.bytes for layout in tensors.values())
        weight_map = {name: file for file, group in zip(names, files, strict=True) for name in group}
        atomic.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _group_by_file(sizes: Sequence[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """Group the tensors into files of at most ``max_bytes``, in order."""
    files: list[list[str]] = []
    bytes_free = 0
    for name, size in sizes:
        if not files or size > bytes_free:
            files.append([])
            bytes_free = max_bytes
        files[-1].append(name)
        bytes_free -= size
    return files


def _write_file(path: Path, tensors: Mapping[str, Layout], read: Read) -> None:
    """Write a safetensors file: the header's length, the header, the tensors' bytes."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, layout in tensors.items():
        start, end = end, end + layout.bytes
        header[name] = {"dtype": _DTYPES[layout.dtype], "shape": list(layout.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.parent / atomic.temporary_name(path.name)
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, layout in tensors.items():
            tensor = read(name).to(getattr(torch, layout.dtype)).contiguous()
            assert tuple(tensor.shape) == layout.shape, name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
