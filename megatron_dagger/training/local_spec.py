"""Megatron's local layer spec, completed for packed rows: used on the CPU, and for fp32 on a GPU.

Megatron's own local norm refuses sequence parallelism, and its local attention refuses packed rows; the modules here
accept both. Parameters have the same names in a checkpoint as those of Transformer Engine's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional

from megatron_dagger.training.tree_attention import TreeAttention


class RMSNorm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Tells Megatron that each tensor-parallel rank has the gradient of its own tokens only.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
        if torch.cuda.is_available() and not config.use_cpu_initialization:
            self.weight.data = self.weight.data.cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def local_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    """Return the spec of a chunk's layers; ``vp_stage`` is the virtual pipeline stage, None without one."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:  # an MoE layer's norm is fused into no linear, so Transformer Engine does not rename it
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = spec.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    attention.core_attention = TreeAttention
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)
