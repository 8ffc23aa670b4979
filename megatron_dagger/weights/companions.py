"""The files that accompany a model's weights: tokenizer, chat template, generation settings, special token ids."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dagger.store import atomic
from megatron_dagger.text import parse_json
from megatron_dagger.weights.errors import CheckpointReadError

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of LoRA weights without their model
TEMPLATES = "additional_chat_templates"  # a folder, beside chat_template.jinja
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".distcp"),
    *(".zip", ".tar", ".gz", ".index.json", ".ckpt", ".nemo", ".pkl", ".pickle", ".onnx_data", ".py", ".tmp"),
)
MAX_BYTES = 128 << 20  # a tokenizer has up to some 30 MiB
_POINTER = b"version https://git-lfs.github.com/spec/"


def copy_companions(source: Path, target: Path) -> None:
    """Copy the small files beside the weights in ``source``, if there are any, but not its config.json.

    Raises CheckpointReadError for a Git LFS pointer and for a link to a file that is not the checkpoint's.
    """
    for folder in (source, source / TEMPLATES):
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in paths:
            if path.is_file() and path.name != CONFIG and not path.name.startswith(".") and not _holds_weights(path):
                check_no_pointer(path)
                _check_inside(path, source)
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                atomic.write_bytes(copy, path.read_bytes())


def token_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special token ids of a config.json: those that begin, end and pad a sequence."""
    return {name: config[name] for name in _TOKEN_IDS if _is_token_id(config.get(name))}


def token_ids_in(folder: Path) -> dict[str, Any]:
    """Return the special token ids of a folder's config.json; {} if there is none."""
    return token_ids(read_config(folder / CONFIG)) if (folder / CONFIG).is_file() else {}


def read_config(path: Path) -> Mapping[str, Any]:
    """Return a JSON file's object. Raises CheckpointReadError if it cannot be read."""
    check_no_pointer(path)
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointReadError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointReadError(f"{path} must hold a JSON object")
    return content


def check_no_pointer(path: Path) -> None:
    """Raise CheckpointReadError if a file is missing, or a Git LFS pointer instead of the file."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise CheckpointReadError(f"{path} cannot be read: {error.strerror}") from error
    if start == _POINTER:
        raise CheckpointReadError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there")


def _holds_weights(path: Path) -> bool:
    return path.name.endswith(_WEIGHTS) or path.stat().st_size > MAX_BYTES


def _check_inside(path: Path, checkpoint: Path) -> None:
    """Raise CheckpointReadError if a link leads out of the checkpoint, or of the hub's cache that it lies in."""
    root = checkpoint.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise CheckpointReadError(f"{path} is a link to {path.resolve()}, which is not a file of the checkpoint")


def _is_token_id(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(item, int) and not isinstance(item, bool) for item in values)
