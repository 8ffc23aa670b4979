"""A family's tables when the engine holds its linear layers in block-wise FP8.

The format is that of Qwen3's published FP8 checkpoints and vLLM's ``Fp8LinearMethod``: e4m3 values, and for every
128 x 128 block of a canonical tensor a float32 scale in ``<name>_scale_inv``. Weight = value x scale. The embedding,
the output layer, norms and biases are not quantised.

A trainer's shard may end within a block. Therefore the trainer's ranks first agree on all scales
(``weights/quantise.py``), and on Megatron's side every rank holds each tensor of scales whole.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Shard, ShardDim
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.megatron_tensor import FusedPart, MegatronTensor, Shape
from megatron_dagger.weights.families.vllm_tensor import VllmTensor

Quantization = Literal["none", "fp8"]
BLOCK = 128  # rows and columns
VALUES = "float8_e4m3fn"  # the dtype of quantised values, by torch's name
SCALES = "_scale_inv"  # ends the names of scales


def vllm_table(model: ModelConfig, quantization: Quantization) -> dict[str, VllmTensor]:
    """Return vLLM's parameters by name, each followed by its scales. Raises WeightMapError for experts in FP8."""
    table = lookup(model).vllm(model)
    if quantization == "none":
        return table
    if model.num_moe_experts is not None:
        raise WeightMapError(
            f"family {model.family}: experts cannot be quantised yet; set rollout.engine.quantization=none"
        )
    with_scales = {}
    for name, parameter in table.items():
        with_scales[name] = parameter
        if is_quantised(parameter):
            with_scales[scales_name(name)] = _scales(parameter)
    return with_scales


def megatron_table(model: ModelConfig, quantization: Quantization) -> dict[str, MegatronTensor]:
    """Return Megatron's tensors by global name, and the tensors of scales that the trainer's ranks compute."""
    table = dict(lookup(model).megatron(model))
    if quantization != "none":
        for name, (rows, *tail) in scales_shapes(model).items():
            table[source_name(name)] = MegatronTensor(parts=(FusedPart(name=name, rows=rows),), tail=tuple(tail))
    return table


def parameter_dtypes(model: ModelConfig, quantization: Quantization, dtype: str) -> dict[str, str]:
    """Return the dtype of each vLLM parameter, by torch's name. ``dtype`` is that of parameters without scales."""
    table = vllm_table(model, quantization)

    def dtype_of(name: str) -> str:
        if name.endswith(SCALES):
            return "float32"
        return VALUES if scales_name(name) in table else dtype

    return {name: dtype_of(name) for name in table}


def is_quantised(parameter: VllmTensor) -> bool:
    """Return whether the parameter is a linear layer's matrix. These are sharded, unlike the router."""
    return bool(parameter.tail) and parameter.shard_dim is not ShardDim.NONE and not parameter.padded


def scales_name(name: str) -> str:
    """Return the name of the scales of a parameter or canonical tensor."""
    return name + SCALES


def source_name(scales: str) -> str:
    """Return the trainer's name of the tensor of scales with this canonical name."""
    return "decoder." + scales.removeprefix("model.")


def scales_shape(shape: Shape) -> Shape:
    """Return the shape of a matrix's scales: one per block, partial blocks included."""
    return tuple(math.ceil(extent / BLOCK) for extent in shape)


def check_whole_blocks(name: str, parameter: VllmTensor, shard: Shard) -> None:
    """Raise WeightMapError if a rank's shard of a parameter ends within a block, which vLLM rejects too."""
    for block in parameter.blocks(shard):
        total = (next(part.rows for part in parameter.parts if part.name == block.name), *parameter.tail)
        for axis, (start, extent) in enumerate(zip(block.canonical.start, block.canonical.shape, strict=True)):
            end = start + extent
            if start % BLOCK or (end % BLOCK and end != total[axis]) or (axis == 0 and block.start[0] % BLOCK):
                raise WeightMapError(
                    f"{name!r}: elements {start} to {end} of {block.name!r} along dimension {axis} are not whole "
                    f"FP8 blocks of {BLOCK}; use a smaller rollout.engine.tensor_parallel_size, or "
                    "rollout.engine.quantization=none"
                )


def scales_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Return the names and shapes of the canonical tensors of scales."""
    return {
        part.name: (part.rows, *parameter.tail)
        for name, parameter in vllm_table(model, "fp8").items()
        if name.endswith(SCALES)
        for part in parameter.parts
    }


def _scales(parameter: VllmTensor) -> VllmTensor:
    """Return the entry of a parameter's scales. It is sharded at the same places, which are block boundaries."""
    parts = []
    heads = parameter.heads if parameter.heads and parameter.tail[0] // parameter.heads % BLOCK == 0 else None
    for part in parameter.parts:
        whole_heads = part.heads is not None and part.rows // part.heads % BLOCK == 0
        parts.append(
            replace(
                part,
                name=scales_name(part.name),
                rows=math.ceil(part.rows / BLOCK),
                heads=part.heads if whole_heads else None,
                replicated=part.replicated and whole_heads,
            )
        )
    return replace(parameter, parts=tuple(parts), tail=scales_shape(parameter.tail), heads=heads)
