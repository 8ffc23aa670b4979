"""Hugging Face checkpoints: safetensors files with an index, read and written tensor by tensor.

Only requested tensors are read. All sizes are known before writing, so a file's header is written first and then its
tensors, with no more than one in memory. A file gets its name when it is complete; an interrupted conversion resumes
with the first missing file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.store import atomic
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import ITEMSIZE
from megatron_dagger.weights.errors import CheckpointReadError

if TYPE_CHECKING:
    import torch

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_TIED_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"

Read = Callable[[str], "torch.Tensor"]


class HfCheckpoint:
    """A directory with config.json and safetensors files.

    Raises CheckpointReadError if a file is missing or damaged, or belongs to another model.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)
        try:
            self.model = ModelConfig.from_hf(json.loads((self.directory / CONFIG).read_text()))
            self._files = self._index()
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointReadError(f"{directory} is not a Hugging Face checkpoint: {error!r}") from error
        self._open: dict[str, Any] = {}
        # Older checkpoints hold this buffer, which is computed from the config
        self._files = {name: file for name, file in self._files.items() if not name.endswith("rotary_emb.inv_freq")}
        if self.model.tie_embeddings and _TIED_HEAD in self._files:
            self._drop_tied_head()
        try:
            families.lookup(self.model).check_complete(self._files, self.model)
        except families.WeightMapError as error:
            raise CheckpointReadError(f"{directory}: {error}") from None

    def read(self, name: str) -> torch.Tensor:
        """Return a canonical tensor in its stored dtype."""
        file = self._files[name]
        tensor: torch.Tensor = self._opened(file).get_tensor(name)
        expected = families.canonical_names(self.model)[name]
        if tuple(tensor.shape) != expected:
            raise CheckpointReadError(f"{self.directory / file}: {name!r} is {tuple(tensor.shape)}, not {expected}")
        return tensor

    def canonical_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) for every tensor, in the model's order."""
        for name in families.canonical_names(self.model):
            yield name, self.read(name)

    def dtype(self) -> str:
        """Return torch's name of the embedding's dtype."""
        return str(self.read(_EMBEDDING).dtype).removeprefix("torch.")

    def _index(self) -> dict[str, str]:
        """Return the file of each tensor."""
        index = self.directory / INDEX
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for file in set(files.values()):
                if Path(file).name != file or not (self.directory / file).is_file():
                    raise CheckpointReadError(f"{index} names {file!r}, which does not exist")
            return files
        return dict.fromkeys(self._names(SINGLE), SINGLE)

    def _names(self, file: str) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.directory / file), framework="pt") as opened:
                return list(opened.keys())
        except SafetensorError as error:
            raise CheckpointReadError(f"{self.directory / file} is damaged: {error}") from error

    def _opened(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(str(self.directory / file), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointReadError(f"{self.directory / file} is damaged: {error}") from error
        return self._open[file]

    def _drop_tied_head(self) -> None:
        """Drop a stored output layer that is equal to the tied embedding. Raises CheckpointReadError if it differs."""
        import torch

        head, embedding = (self._opened(self._files[n]).get_tensor(n) for n in (_TIED_HEAD, _EMBEDDING))
        if not torch.equal(head, embedding):
            raise CheckpointReadError(
                f"{self.directory} has tie_word_embeddings, but {_TIED_HEAD} differs from {_EMBEDDING}: "
                "set tie_word_embeddings to false"
            )
        del self._files[_TIED_HEAD]


def write_hf(directory: Path, model: ModelConfig, read: Read, dtype: str, *, max_bytes: int = 5 << 30) -> None:
    """Write config.json and the safetensors files of ``model`` into ``directory``, resuming an interrupted call.

    Files already in ``directory`` must be of the same weights and arguments, which ``store.resumable`` ensures.
    ``read(name)`` returns a canonical tensor, which is cast to ``dtype``. No file exceeds ``max_bytes`` by more than
    its header, unless a single tensor does. The index is written last.
    """
    shapes = families.canonical_names(model)
    files = _group_by_file([(name, math.prod(shape) * ITEMSIZE[dtype]) for name, shape in shapes.items()], max_bytes)
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = [SINGLE]
    for file, tensors in zip(names, files, strict=True):
        if not (directory / file).exists():
            _write_file(directory / file, tensors, read, dtype, shapes)
    atomic.write_json(directory / CONFIG, model.hf_config() | {"torch_dtype": dtype})
    if len(files) > 1:
        total = sum(math.prod(shape) * ITEMSIZE[dtype] for shape in shapes.values())
        weight_map = {name: file for file, tensors in zip(names, files, strict=True) for name in tensors}
        atomic.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_companion_files(source: Path, target: Path) -> None:
    """Copy the files that accompany a model's weights: tokenizer, chat template, generation settings."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        is_companion = path.is_file() and not path.name.endswith(_WEIGHT_FILES)
        if is_companion and path.name not in (INDEX, CONFIG) and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


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


def _write_file(path: Path, names: Sequence[str], read: Read, dtype: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file: the header's length, the header, the tensors' bytes."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + math.prod(shapes[name]) * ITEMSIZE[dtype]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.parent / atomic.temporary_name(path.name)
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = read(name).to(getattr(torch, dtype)).contiguous()
            assert tuple(tensor.shape) == shapes[name], name
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
