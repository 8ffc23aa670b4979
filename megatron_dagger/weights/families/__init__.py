"""The weight maps of the model families: one file each, with the family's name in ``config/families.py``.

Works on torch tensors and numpy arrays alike; torch is imported only if the tensors are torch's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megatron_dagger.config.families import FAMILIES
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families.base import WeightMap
from megatron_dagger.weights.families.megatron_tensor import FusedPart, MegatronTensor, Shape
from megatron_dagger.weights.families.vllm_tensor import StackedPart, VllmTensor

WEIGHT_MAPS: dict[str, WeightMap] = {name: import_module(f"{__name__}.{name}").WEIGHT_MAP for name in FAMILIES}


def lookup(model: ModelConfig) -> WeightMap:
    """Return the weight map of the model's family."""
    return WEIGHT_MAPS[model.family]


def to_canonical(name: str, full_tensor: Any, model: ModelConfig) -> list[tuple[str, Any]]:
    """Split a full Megatron tensor into canonical Hugging Face tensors: ``[(name, tensor), ...]``."""
    return lookup(model).to_canonical(name, full_tensor, model)


def from_canonical(name: str, tensors: Mapping[str, Any], model: ModelConfig, *, padded_rows: int | None = None) -> Any:
    """Build the full Megatron tensor ``name`` from canonical Hugging Face tensors."""
    return lookup(model).from_canonical(name, tensors, model, padded_rows=padded_rows)


def canonical_names(model: ModelConfig) -> dict[str, Shape]:
    """Return the name and shape of every canonical tensor of the model."""
    return lookup(model).canonical_names(model)


def parameter_count(model: ModelConfig) -> int:
    """Return the number of the model's weights. A tied embedding counts once."""
    return sum(math.prod(shape) for shape in canonical_names(model).values())


__all__ = [
    "WEIGHT_MAPS",
    "FusedPart",
    "MegatronTensor",
    "StackedPart",
    "VllmTensor",
    "WeightMap",
    "WeightMapError",
    "canonical_names",
    "from_canonical",
    "lookup",
    "parameter_count",
    "to_canonical",
]
