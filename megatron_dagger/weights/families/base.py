"""How one family's Megatron-Core tensors are laid out in canonical (Hugging Face) tensors.

A Megatron tensor is described by a Layout: its rows (dimension 0) are ``groups`` repetitions of
the concatenation of its parts, each part a fixed number of rows of one canonical tensor. That
covers plain tensors (one part, one group), gate and up fused (two parts, one group) and QKV
interleaved by query group (three parts, one group per query group). Nothing else is done to a
tensor on its way: no transposition, no scaling, no change of dtype, so round trips are bit-exact.

Works on torch tensors and numpy arrays alike; torch is imported only if the tensors are torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dagger.config.model import ModelConfig

Shape = tuple[int, ...]


class WeightMapError(ValueError):
    """A tensor has a name or a shape that the model family does not know."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """``rows`` rows per group of the canonical tensor ``name``."""

    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The rows of one Megatron tensor; ``tail`` is its shape after dimension 0.

    ``padded``: Megatron may have appended rows (vocabulary padding), which are cut off.
    """

    parts: tuple[Part, ...]
    tail: Shape = ()
    groups: int = 1
    padded: bool = False

    @property
    def shape(self) -> Shape:
        """The Megatron tensor's global shape, without padding."""
        return (self.groups * sum(part.rows for part in self.parts), *self.tail)

    def canonical_shapes(self) -> dict[str, Shape]:
        return {part.name: (self.groups * part.rows, *self.tail) for part in self.parts}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family's map, in both directions.

    ``layouts`` gives, for a model, the layout of each global Megatron name. ``alternatives`` maps
    a second spelling of a name's end to the one in ``layouts`` (layer specs differ in them).
    """

    name: str
    layouts: Callable[[ModelConfig], dict[str, Layout]]
    alternatives: Mapping[str, str]

    def layout(self, name: str, model: ModelConfig) -> Layout:
        """The layout of a Megatron tensor by its global name; WeightMapError if there is none."""
        table = self.layouts(model)
        known = table.get(name)
        if known is None:
            for end, other in self.alternatives.items():
                if name.endswith("." + end):
                    known = table.get(name.removesuffix(end) + other)
        if known is None:
            tied = "tied" if model.tie_embeddings else "untied"
            raise WeightMapError(
                f"Megatron tensor {name!r} is unknown to family {self.name} with {model.num_layers} layers "
                f"and {tied} embeddings; it knows {', '.join(_ends(table))}"
            )
        return known

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

    def check_complete(self, names: Sequence[str] | Mapping[str, Any], model: ModelConfig) -> None:
        """Raise WeightMapError if canonical ``names`` miss a tensor of the model or hold another."""
        expected = self.canonical_names(model)
        missing = [name for name in expected if name not in set(names)]
        extra = [name for name in names if name not in expected]
        if missing or extra:
            raise WeightMapError(
                f"the weights do not cover the model: missing {missing[:5] or 'none'} ({len(missing)}), "
                f"left over {extra[:5] or 'none'} ({len(extra)})"
            )


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
