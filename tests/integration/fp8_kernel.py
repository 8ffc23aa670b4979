"""A plain block-wise FP8 linear layer for vLLM on CPUs without AMX, for which vLLM has no kernel.

Weights are dequantised to the activations' dtype; activations are not quantised. Everything else about FP8 models is
vLLM's: parameters, loaders, sharding, reload.
"""

from __future__ import annotations

import torch
from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.platforms.interface import PlatformEnum


class PlainFp8Kernel(Fp8BlockScaledMMLinearKernel):
    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def process_weights_after_loading(self, layer):
        """Do nothing: the weights are used unpacked."""

    def apply_weights(self, layer, x, bias=None, **kwargs):
        size = self.weight_group_shape.row
        scales = layer.weight_scale_inv.repeat_interleave(size, 0).repeat_interleave(size, 1)
        rows, columns = layer.weight.shape
        weight = layer.weight.float() * scales[:rows, :columns]
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    def apply_block_scaled_mm(self, A, B, As, Bs):
        raise AssertionError("apply_weights replaces this method")


def register():
    kernels = _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if PlainFp8Kernel not in kernels:
        kernels.append(PlainFp8Kernel)  # after vLLM's own
