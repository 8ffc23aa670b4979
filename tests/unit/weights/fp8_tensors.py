"""Canonical tensors as in a published FP8 checkpoint, each quantised whole, and their dequantisation."""

import torch

from megatron_dagger.weights.families.fp8 import SCALES, scales_name, scales_shapes
from megatron_dagger.weights.quantise import quantise_matrix


def quantised(model, tensors):
    """Return ``tensors``, (name, tensor) pairs, with those of linear layers in e4m3, followed by their scales."""
    names, result = scales_shapes(model), {}
    for name, tensor in tensors:
        result[name] = tensor
        if scales_name(name) in names:
            result[name], result[scales_name(name)] = quantise_matrix(tensor)
    return result


def dequantised(values, scales):
    """Return the matrix in float32 that has these values and block scales."""
    rows, columns = (torch.arange(extent) // 128 for extent in values.shape)
    return values.float() * scales[rows][:, columns]


def without_scales(tensors):
    """Return ``quantised`` tensors dequantised to float32, without their scales."""
    return {
        name: dequantised(tensor, tensors[scales_name(name)]) if scales_name(name) in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith(SCALES)
    }
