"""A family's tables where the engine holds its linear layers in block-wise FP8.

The format of Qwen3's published FP8 checkpoints and of vLLM's ``Fp8LinearMethod``: e4m3 values, and a
float32 scale ``<name>_scale_inv`` for every block of 128 x 128 of a canonical tensor, by which the block's
values are multiplied to get the weights back. Embedding, output layer, norms and biases stay as they are.

Which rank has a scale does not follow from which rank has the block's values: a trainer's shard may end
within a block. So the trainer's ranks first agree on all scales (``weights/quantise.py``), and on
Megatron's side a table of scales is a tensor that every rank holds whole.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Cut, Shard
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.megatron_tensor import Layout, Part, Shape
from megatron_dagger.weights.families.vllm_tensor import Parameter

Quantization = Literal["none", "fp8"]
BLOCK = 128
VALUES = "float8_e4m3fn"
SCALES = "_scale_inv"


def vllm_table(model: ModelConfig, quantization: Quantization) -> dict[str, Parameter]:
    """vLLM's parameters; the scales of one come right after it."""
    table = lookup(model).vllm(model)
    if quantization == "none":
        return table
    if model.num_moe_experts is not None:
        raise WeightMapError(
            f"family {model.family}: experts cannot be quantised on their way yet; set rollout.engine.quantization=none"
        )
    found = {}
    for name, parameter in table.items():
        found[name] = parameter
        if is_quantised(parameter):
            found[scales_name(name)] = _scales(parameter)
    return found


def megatron_table(model: ModelConfig, quantization: Quantization) -> dict[str, Layout]:
    """Megatron's tensors, and the tables of scales that the trainer's ranks make."""
    table = dict(lookup(model).megatron(model))
    if quantization != "none":
        for name, (rows, *tail) in scales_shapes(model).items():
            table[source_name(name)] = Layout(parts=(Part(name=name, rows=rows),), tail=tuple(tail))
    return table


def wire_dtypes(model: ModelConfig, quantization: Quantization, dtype: str) -> dict[str, str]:
    """What each of vLLM's parameters is held in; ``dtype`` is that of what is not quantised."""
    table = vllm_table(model, quantization)

    def held(name: str) -> str:
        if name.endswith(SCALES):
            return "float32"
        return VALUES if scales_name(name) in table else dtype

    return {name: held(name) for name in table}


def is_quantised(parameter: Parameter) -> bool:
    """Whether it is a linear layer's matrix: those are cut by tensor parallelism; the router is not."""
    return bool(parameter.tail) and parameter.cut is not Cut.NONE and not parameter.padded


def scales_name(name: str) -> str:
    """The name of a parameter's, or a canonical tensor's, scales."""
    return name + SCALES


def source_name(scales: str) -> str:
    """What the trainer's ranks call the table of scales of this canonical name."""
    return "decoder." + scales.removeprefix("model.")


def scales_shape(shape: Shape) -> Shape:
    """The shape of the scales of a matrix."""
    return tuple(math.ceil(extent / BLOCK) for extent in shape)


def check_whole_blocks(name: str, parameter: Parameter, shard: Shard) -> None:
    """Raise WeightMapError if a rank's share of a parameter cuts a block, which vLLM refuses as well."""
    for block in parameter.blocks(shard):
        total = (next(piece.rows for piece in parameter.pieces if piece.name == block.name), *parameter.tail)
        for axis, (start, extent) in enumerate(zip(block.canonical.start, block.canonical.shape, strict=True)):
            end = start + extent
            if start % BLOCK or (end % BLOCK and end != total[axis]) or (axis == 0 and block.start[0] % BLOCK):
                raise WeightMapError(
                    f"{name!r}: elements {start} to {end} of {block.name!r} along dimension {axis} are no whole "
                    f"FP8 blocks of {BLOCK}; use a smaller rollout.engine.tensor_parallel_size, or no quantization"
                )


def scales_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The canonical tensors of scales, and their shapes."""
    return {
        piece.name: (piece.rows, *parameter.tail)
        for name, parameter in vllm_table(model, "fp8").items()
        if name.endswith(SCALES)
        for piece in parameter.pieces
    }


def _scales(parameter: Parameter) -> Parameter:
    """The parameter that holds another's scales: cut at the same places, as they are ends of blocks."""
    pieces = []
    heads = parameter.heads if parameter.heads and parameter.tail[0] // parameter.heads % BLOCK == 0 else None
    for piece in parameter.pieces:
        whole_heads = piece.heads is not None and piece.rows // piece.heads % BLOCK == 0
        pieces.append(
            replace(
                piece,
                name=scales_name(piece.name),
                rows=math.ceil(piece.rows / BLOCK),
                heads=piece.heads if whole_heads else None,
                replicated=piece.replicated and whole_heads,
            )
        )
    return replace(parameter, pieces=tuple(pieces), tail=scales_shape(parameter.tail), heads=heads)
