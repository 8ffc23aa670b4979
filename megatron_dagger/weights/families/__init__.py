"""The model families whose weights can be named: one file each, found by ``model.family``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import llama, qwen2, qwen3, qwen3_moe
from megatron_dagger.weights.families.base import Family
from megatron_dagger.weights.families.megatron_tensor import Layout, Part, Shape
from megatron_dagger.weights.families.vllm_tensor import Parameter, Piece

FAMILIES: dict[str, Family] = {family.FAMILY.name: family.FAMILY for family in (llama, qwen2, qwen3, qwen3_moe)}


def lookup(model: ModelConfig) -> Family:
    """The family of a model; WeightMapError if there is no map for it."""
    try:
        return FAMILIES[model.family]
    except KeyError:
        raise WeightMapError(
            f"no weight map for model.family={model.family!r}; there are {', '.join(FAMILIES)}"
        ) from None


def to_canonical(name: str, full_tensor: Any, model: ModelConfig) -> list[tuple[str, Any]]:
    """Split a whole Megatron tensor into canonical Hugging Face tensors: ``[(name, tensor), ...]``."""
    return lookup(model).to_canonical(name, full_tensor, model)


def from_canonical(name: str, tensors: Mapping[str, Any], model: ModelConfig, *, padded_rows: int | None = None) -> Any:
    """Build the whole Megatron tensor ``name`` from canonical Hugging Face tensors."""
    return lookup(model).from_canonical(name, tensors, model, padded_rows=padded_rows)


def canonical_names(model: ModelConfig) -> dict[str, Shape]:
    """Every canonical tensor name of the model and its shape."""
    return lookup(model).canonical_names(model)


__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "Parameter",
    "Part",
    "Piece",
    "WeightMapError",
    "canonical_names",
    "from_canonical",
    "lookup",
    "to_canonical",
]
