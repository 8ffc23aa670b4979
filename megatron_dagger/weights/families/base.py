"""A model family: its map between Megatron-Core, canonical (Hugging Face) tensors and vLLM.

Whole tensors are converted here, in both directions; ``layout.py`` and ``parameter.py`` say how the
tables of a family are written, and which part of a tensor a rank holds.

Works on torch tensors and numpy arrays alike; torch is imported only if the tensors are torch's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families.megatron_tensor import Layout, Shape
from megatron_dagger.weights.families.vllm_tensor import Parameter


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family's map.

    ``megatron`` gives, for a model, the layout of each global Megatron name; ``vllm`` the make-up of
    each of vLLM's parameters. In both, the experts of a layer are one entry, with ``{}`` in its name
    on Megatron's side. ``alternatives`` maps second spellings of Megatron's names (layer specs differ
    in them) to those in ``megatron``: regular expressions, and what a match is replaced by.
    """

    name: str
    megatron: Callable[[ModelConfig], dict[str, Layout]]
    vllm: Callable[[ModelConfig], dict[str, Parameter]]
    alternatives: Mapping[str, str]

    def layouts(self, model: ModelConfig) -> dict[str, Layout]:
        """The layout of each global Megatron name, every expert's on its own. Not to be changed."""
        return _each_expert(self.megatron, model)

    def layout(self, name: str, model: ModelConfig) -> Layout:
        """The layout of a Megatron tensor by its global name; WeightMapError if there is none."""
        table = self.layouts(model)
        spellings = [name, *(re.sub(this, that, name) for this, that in self.alternatives.items())]
        for spelling in spellings:
            if spelling in table:
                return table[spelling]
        tied = "tied" if model.tie_embeddings else "untied"
        raise WeightMapError(
            f"Megatron tensor {name!r} is unknown to family {self.name} with {model.num_layers} layers "
            f"and {tied} embeddings; it knows {', '.join(_ends(self.megatron(model)))}"
        )

    def to_canonical(self, name: str, full_tensor: Any, model: ModelConfig) -> list[tuple[str, Any]]:
        """Split a whole (unsharded) Megatron tensor into its canonical tensors.

        The results are views where the layout allows it; use ``contiguous`` before handing out bytes.
        """
        layout = self.layout(name, model)
        shape = tuple(full_tensor.shape)
        rows, *tail = shape or (0,)
        fits = rows == layout.shape[0] or (layout.padded and rows > layout.shape[0])
        if not fits or tuple(tail) != layout.tail:
            raise WeightMapError(
                f"Megatron tensor {name!r} has shape {shape}, the model's settings give {layout.shape}"
                f"{' (more rows are taken as padding)' if layout.padded else ''}"
            )
        grouped = full_tensor[: layout.shape[0]].reshape(layout.groups, -1, *layout.tail)
        parts, start = [], 0
        for part in layout.parts:
            piece = grouped[:, start : start + part.rows]
            parts.append((part.name, piece.reshape(layout.groups * part.rows, *layout.tail)))
            start += part.rows
        return parts

    def from_canonical(
        self, name: str, tensors: Mapping[str, Any], model: ModelConfig, *, padded_rows: int | None = None
    ) -> Any:
        """Build the whole Megatron tensor ``name`` from canonical tensors.

        ``padded_rows`` (for a padded vocabulary) appends zero rows up to that number.
        """
        layout = self.layout(name, model)
        pieces = []
        for part in layout.parts:
            if part.name not in tensors:
                raise WeightMapError(f"Megatron tensor {name!r} needs {part.name!r}, which is missing")
            tensor, expected = tensors[part.name], (layout.groups * part.rows, *layout.tail)
            if tuple(tensor.shape) != expected:
                raise WeightMapError(f"{part.name!r} has shape {tuple(tensor.shape)}, not {expected}")
            pieces.append(tensor.reshape(layout.groups, part.rows, *layout.tail))
        whole = _concatenate(pieces, axis=1).reshape(layout.shape)
        if padded_rows is None or padded_rows == layout.shape[0]:
            return whole
        if not layout.padded or padded_rows < layout.shape[0]:
            raise WeightMapError(f"{name!r} of shape {layout.shape} cannot be padded to {padded_rows} rows")
        padding = _zero_rows(whole, padded_rows - layout.shape[0])
        return _concatenate([whole, padding], axis=0)

    def canonical_names(self, model: ModelConfig) -> dict[str, Shape]:
        """Every canonical tensor of the model and its shape, in the model's order."""
        shapes: dict[str, Shape] = {}
        for layout in self.layouts(model).values():
            shapes.update(layout.canonical_shapes())
        return shapes

    def check_complete(self, names: Iterable[str], model: ModelConfig) -> None:
        """Raise WeightMapError if canonical ``names`` miss a tensor of the model or hold another."""
        expected, given = self.canonical_names(model), list(names)
        known = set(given)
        missing = [name for name in expected if name not in known]
        extra = [name for name in given if name not in expected]
        if missing or extra:
            raise WeightMapError(
                f"the weights do not cover the model: missing {missing[:5] or 'none'} ({len(missing)}), "
                f"left over {extra[:5] or 'none'} ({len(extra)})"
            )


@lru_cache(maxsize=16)
def _each_expert(megatron: Callable[[ModelConfig], dict[str, Layout]], model: ModelConfig) -> dict[str, Layout]:
    table = {}
    for name, layout in megatron(model).items():
        if not layout.experts:
            table[name] = layout
        for number in range(layout.experts):
            table[name.format(number)] = layout.of_expert(number)
    return table


def _ends(table: Mapping[str, Layout]) -> list[str]:
    """The names of a table with layer 0 standing for all layers."""
    return [name for name in table if ".layers." not in name or ".layers.0." in name]


def _concatenate(pieces: list[Any], *, axis: int) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    if _is_numpy(pieces[0]):
        import numpy as np

        return np.concatenate(pieces, axis=axis)
    import torch

    return torch.cat(pieces, dim=axis)


def _zero_rows(like: Any, rows: int) -> Any:
    if _is_numpy(like):
        import numpy as np

        return np.zeros((rows, *like.shape[1:]), dtype=like.dtype)
    return like.new_zeros((rows, *like.shape[1:]))


def _is_numpy(tensor: Any) -> bool:
    return type(tensor).__module__.partition(".")[0] == "numpy"
