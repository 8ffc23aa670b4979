"""Which file of a Hugging Face checkpoint has which tensor, in folders as various programs write them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.weights.companions import ADAPTER, INDEX, check_no_pointer, read_config
from megatron_dagger.weights.errors import CheckpointReadError

SINGLE = "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"
_OTHER_FORMATS = ("consolidated", "adapter_")  # Mistral's own, and LoRA's
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # of torch.compile, FSDP, recompute
_BUFFER = re.compile(r"\.rotary_emb\.[a-z_]+$|\.attn\.(masked_)?bias$")  # older checkpoints hold what is computed
_PICKLE = "weights in a pickle, which may run any code and is never read: save them as safetensors"
_NO_WEIGHTS = {
    ADAPTER: "an adapter, not a model: merge it into its model first (peft: merge_and_unload)",
    "pytorch_model.bin": _PICKLE,
    "pytorch_model.bin.index.json": _PICKLE,
    "consolidated.safetensors": "weights in Mistral's own format only",
}


class StoredTensors:
    """The tensors in the safetensors files of a folder, by canonical name.

    Raises CheckpointReadError if a file is missing, damaged or a Git LFS pointer, if the index names tensors that no
    file has, or if two tensors have one name.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._open: dict[str, Any] = {}
        self._stored = self._locate()

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> Iterable[str]:
        """Return the canonical names, without computed buffers."""
        return self._stored.keys()

    def drop(self, name: str) -> None:
        """Forget a tensor."""
        del self._stored[name]

    def file(self, name: str) -> Path:
        """Return the file of a tensor."""
        return self.directory / self._stored[name][0]

    def read(self, name: str) -> Any:
        """Return a tensor in its stored dtype."""
        file, stored = self._stored[name]
        return self._opened(file).get_tensor(stored)

    def dtype(self, name: str) -> str:
        """Return a tensor's dtype by safetensors' name, such as BF16."""
        file, stored = self._stored[name]
        return str(self._opened(file).get_slice(stored).get_dtype())

    def _locate(self) -> dict[str, tuple[str, str]]:
        """Return (file, stored name) by canonical name."""
        weight_map = self._weight_map()
        files = sorted(set(weight_map.values())) or self._files()
        stored: dict[str, str] = {}
        for file in files:
            for name in self._opened(file).keys():  # noqa: SIM118 (not a dict)
                if name in stored and name not in weight_map:
                    raise CheckpointReadError(f"{self.directory}: {stored[name]} and {file} both have {name!r}")
                if name not in stored or weight_map[name] == file:
                    stored[name] = file
        for name, file in weight_map.items():
            if name not in stored:
                raise CheckpointReadError(f"{self.directory / INDEX} says that {file} has {name!r}, but it does not")
        located: dict[str, tuple[str, str]] = {}
        for name, canonical in canonical_names(stored).items():
            if canonical in located:
                raise CheckpointReadError(
                    f"{self.directory} has {located[canonical][1]!r} and {name!r}, the same tensor"
                )
            located[canonical] = (stored[name], name)
        return located

    def _weight_map(self) -> Mapping[str, str]:
        """Return the file of each tensor by the index; {} without one, or where Transformers reads a single file."""
        index = self.directory / INDEX
        if not index.exists() or (self.directory / SINGLE).exists():
            return {}
        weight_map = read_config(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointReadError(f"{index} has no weight_map")
        for file in weight_map.values():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointReadError(f"{index} names {file!r}, which is no file of this folder")
        for file in set(weight_map.values()):
            if not file.endswith(".safetensors"):
                raise CheckpointReadError(f"{index} names {file}: only safetensors files are read")
            if not (self.directory / file).is_file():
                raise CheckpointReadError(f"{index} names {file!r}, which does not exist")
        return weight_map

    def _files(self) -> list[str]:
        """Return the files of a folder whose index does not name them."""
        if (self.directory / SINGLE).exists():
            return [SINGLE]
        names = sorted(path.name for path in self.directory.glob("*.safetensors"))
        names = [name for name in names if not name.startswith(_OTHER_FORMATS)]
        if not names:
            reasons = (why for name, why in _NO_WEIGHTS.items() if (self.directory / name).exists())
            gguf = any(self.directory.glob("*.gguf"))
            why = "a GGUF file: `megatron-dagger convert gguf-to-hf` converts it" if gguf else "no safetensors file"
            raise CheckpointReadError(f"{self.directory} holds {next(reasons, why)}")
        return names

    def _opened(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            path = self.directory / file
            check_no_pointer(path)
            try:
                self._open[file] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointReadError(f"{path} is damaged: {error}") from error
        return self._open[file]


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Return the canonical names of stored ones, by these; computed buffers are left out.

    Programs put ``module.`` or ``base_model.model.`` before all names, or their wrappers' names within them; a model
    without its head is stored without ``model.``.
    """
    names = {name: name for name in stored}
    for wrapper in _WRAPPERS:
        names = {name: canonical.replace(wrapper, "") for name, canonical in names.items()}
    embedding = _EMBEDDING.removeprefix("model.")
    embeddings = [name for name in names.values() if name == embedding or name.endswith(f".{embedding}")]
    if embeddings == [embedding]:
        names = {name: f"model.{rest}" if rest != "lm_head.weight" else rest for name, rest in names.items()}
    elif len(embeddings) == 1 and embeddings[0].endswith(_EMBEDDING):
        prefix = embeddings[0].removesuffix(_EMBEDDING)
        names = {name: rest.removeprefix(prefix) for name, rest in names.items()}
    return {name: rest for name, rest in names.items() if not _BUFFER.search(rest)}
