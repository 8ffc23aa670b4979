"""A family's weight map: how its tensors are named and laid out in Megatron-Core, Hugging Face and vLLM.

Full tensors are converted here, in both directions. ``megatron_tensor.py`` and ``vllm_tensor.py`` describe the entries
of a map, and which blocks of a tensor a rank holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor, Shape
from megatron_dagger.weights.families.vllm_tensor import VllmTensor


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """The weight map of a model family.

    ``megatron`` returns the model's Megatron tensors by global name, ``vllm`` the engine's parameters by name. In both
    the experts of a layer are a single entry; on Megatron's side its name contains ``{}``. ``alternatives`` maps other
    spellings of Megatron's names, which depend on the layer spec, to those in ``megatron``: regular expressions and
    their replacements.
    """

    megatron: Callable[[ModelConfig], dict[str, MegatronTensor]]
    vllm: Callable[[ModelConfig], dict[str, VllmTensor]]
    alternatives: Mapping[str, str]

    def megatron_tensors(self, model: ModelConfig) -> dict[str, MegatronTensor]:
        """Return the entry of each global Megatron name, one per expert. The result is shared: do not change it."""
        return _expand_experts(self.megatron, model)

    def megatron_tensor(self, name: str, model: ModelConfig) -> MegatronTensor:
        """Return the entry of a global Megatron name. Raises WeightMapError for an unknown name."""
        table = self.megatron_tensors(model)
        spellings = [name, *(re.sub(this, that, name) for this, that in self.alternatives.items())]
        for spelling in spellings:
            if spelling in table:
                return table[spelling]
        tied = "tied" if model.tie_embeddings else "untied"
        raise WeightMapError(
            f"Megatron tensor {name!r} is unknown to family {model.family} with {model.num_layers} layers "
            f"and {tied} embeddings; the known tensors are {', '.join(_first_layer(self.megatron(model)))}"
        )

    def to_canonical(self, name: str, full_tensor: Any, model: ModelConfig) -> list[tuple[str, Any]]:
        """Split a full (unsharded) Megatron tensor into its canonical tensors.

        The results are views where possible: call ``contiguous`` before using their bytes. Raises WeightMapError for
        an unknown name or another shape.
        """
        entry = self.megatron_tensor(name, model)
        shape = tuple(full_tensor.shape)
        rows, *tail = shape or (0,)
        fits = rows == entry.shape[0] or (entry.padded and rows > entry.shape[0])
        if not fits or tuple(tail) != entry.tail:
            raise WeightMapError(
                f"Megatron tensor {name!r} has shape {shape}, but the model's settings give {entry.shape}"
                f"{' (more rows would be taken as padding)' if entry.padded else ''}"
            )
        grouped = full_tensor[: entry.shape[0]].reshape(entry.groups, -1, *entry.tail)
        canonical, start = [], 0
        for part in entry.parts:
            rows_of_part = grouped[:, start : start + part.rows]
            canonical.append((part.name, rows_of_part.reshape(entry.groups * part.rows, *entry.tail)))
            start += part.rows
        return canonical

    def from_canonical(
        self, name: str, tensors: Mapping[str, Any], model: ModelConfig, *, padded_rows: int | None = None
    ) -> Any:
        """Build the full Megatron tensor ``name`` from canonical tensors.

        ``padded_rows`` (for a padded vocabulary) appends zero rows up to that number. Raises WeightMapError if a
        tensor is missing or has another shape.
        """
        entry = self.megatron_tensor(name, model)
        grouped = []
        for part in entry.parts:
            if part.name not in tensors:
                raise WeightMapError(f"Megatron tensor {name!r} needs {part.name!r}, which is missing")
            tensor, expected = tensors[part.name], (entry.groups * part.rows, *entry.tail)
            if tuple(tensor.shape) != expected:
                raise WeightMapError(f"{part.name!r} has shape {tuple(tensor.shape)}, not {expected}")
            grouped.append(tensor.reshape(entry.groups, part.rows, *entry.tail))
        full = _concatenate(grouped, axis=1).reshape(entry.shape)
        if padded_rows is None or padded_rows == entry.shape[0]:
            return full
        if not entry.padded or padded_rows < entry.shape[0]:
            raise WeightMapError(f"{name!r} of shape {entry.shape} cannot be padded to {padded_rows} rows")
        padding = _zero_rows(full, padded_rows - entry.shape[0])
        return _concatenate([full, padding], axis=0)

    def canonical_names(self, model: ModelConfig) -> dict[str, Shape]:
        """Return the name and shape of every canonical tensor, in the model's order."""
        shapes: dict[str, Shape] = {}
        for entry in self.megatron_tensors(model).values():
            shapes.update(entry.canonical_shapes())
        return shapes

    def check_complete(self, names: Iterable[str], model: ModelConfig) -> None:
        """Raise WeightMapError unless ``names`` are exactly the model's canonical tensors."""
        expected, names = self.canonical_names(model), list(names)
        known = set(names)
        missing = [name for name in expected if name not in known]
        extra = [name for name in names if name not in expected]
        if missing or extra:
            raise WeightMapError(
                f"the weights do not cover the model: missing {missing[:5] or 'none'} ({len(missing)}), "
                f"left over {extra[:5] or 'none'} ({len(extra)})"
            )


@lru_cache(maxsize=16)
def _expand_experts(
    megatron: Callable[[ModelConfig], dict[str, MegatronTensor]], model: ModelConfig
) -> dict[str, MegatronTensor]:
    table = {}
    for name, entry in megatron(model).items():
        if not entry.experts:
            table[name] = entry
        for number in range(entry.experts):
            table[name.format(number)] = entry.of_expert(number)
    return table


def _first_layer(table: Mapping[str, MegatronTensor]) -> list[str]:
    """Return a table's names without those of layers after layer 0."""
    return [name for name in table if ".layers." not in name or ".layers.0." in name]


def _concatenate(arrays: list[Any], *, axis: int) -> Any:
    if len(arrays) == 1:
        return arrays[0]
    if is_numpy(arrays[0]):
        import numpy as np

        return np.concatenate(arrays, axis=axis)
    import torch

    return torch.cat(arrays, dim=axis)


def _zero_rows(like: Any, rows: int) -> Any:
    if is_numpy(like):
        import numpy as np

        return np.zeros((rows, *like.shape[1:]), dtype=like.dtype)
    return like.new_zeros((rows, *like.shape[1:]))


def is_numpy(tensor: Any) -> bool:
    """Return whether the tensor is a numpy array, without importing torch."""
    return type(tensor).__module__.partition(".")[0] == "numpy"
