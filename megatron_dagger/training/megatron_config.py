"""Megatron-Core's TransformerConfig from our settings, and which layers and attention a training uses.

Layers are Transformer Engine's on a GPU in BF16 and FP8, else Megatron's local ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dagger.config import ModelConfig, TrainingConfig, trainer_support
from megatron_dagger.training import compat, optimizer

# The core attention: "trees" runs trunk by trunk and branch by branch (local layers); with Transformer Engine's layers
# "blocks" uses a block mask of the trees, and "segments" Transformer Engine's own attention on rows without branches.
Attention = Literal["trees", "blocks", "segments"]


def check_supported(model: ModelConfig, training: TrainingConfig) -> None:
    """Raise ConfigError for settings that this trainer cannot run on this machine."""
    trainer_support.check_supported(model, training, cuda=torch.cuda.is_available())


def attention_kind(training: TrainingConfig) -> Attention:
    """Return the core attention of a training on this machine."""
    if not trainer_support.uses_transformer_engine(training, cuda=torch.cuda.is_available()):
        return "trees"
    return "blocks" if training.packing == "shared_prefix" else "segments"


@contextmanager
def without_fp8(configs: Iterable[TransformerConfig]) -> Iterator[None]:
    """Compute the block in BF16 where the model's ``configs`` say FP8: Megatron's layers read it in each pass."""
    saved = [(config, config.fp8) for config in configs]
    for config, _ in saved:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in saved:
            config.fp8 = fp8


def transformer_config(model: ModelConfig, training: TrainingConfig) -> TransformerConfig:
    """Return Megatron's config for this model, layout and precision on this machine."""
    config = compat.transformer_config(**settings(model, training, cuda=torch.cuda.is_available()))
    if model.yarn:  # Megatron reads these from attributes that are not fields
        for name, value in dataclasses.asdict(model.yarn).items():
            setattr(config, f"yarn_{'rotary_scaling_factor' if name == 'factor' else name}", value)
        for name, value in {"mscale": None, "mscale_all_dim": None, "correction_range_round_to_int": True}.items():
            setattr(config, f"yarn_{name}", value)
    return config


def settings(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> dict[str, Any]:
    """Return the fields of Megatron's TransformerConfig, for a machine with CUDA or without."""
    parallel = training.parallel
    te = trainer_support.uses_transformer_engine(training, cuda=cuda)
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    virtual = parallel.virtual_pipeline_model_parallel_size
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "qk_layernorm": model.qk_norm,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.qkv_bias,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual and virtual > 1 else None,
        "sequence_parallel": parallel.sequence_parallel,
        "calculate_per_token_loss": True,  # gradients are summed, and our loss is normalised already
        "batch_p2p_comm": cuda,  # gloo delivers batched interleaved transfers to the wrong receive
        "use_cpu_initialization": not cuda,
        "apply_rope_fusion": te and model.yarn is None,  # the fused kernel omits YaRN's mscale on packed rows
        "bias_activation_fusion": te,
        "bias_dropout_fusion": te,
        "gradient_accumulation_fusion": False,  # needs APEX for the output layer
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "attention_softmax_in_fp32": True,
        **_experts(model, training, te),
        **_recompute(training),
        **_fp8(training),
    }


def _experts(model: ModelConfig, training: TrainingConfig, te: bool) -> dict[str, Any]:
    """Return the fields of experts: no dropped tokens and no auxiliary loss, which would depend on the packing."""
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        # The softmax over the chosen logits equals the softmax over all, renormalised over the chosen ones.
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "moe_router_dtype": "fp32" if te else None,
        "moe_router_padding_for_quantization": training.precision.startswith("fp8"),
        "expert_model_parallel_size": training.parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": training.parallel.expert_tensor_parallel_size,
    }


def _recompute(training: TrainingConfig) -> dict[str, Any]:
    if training.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if training.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)}
    return {}


def _fp8(training: TrainingConfig) -> dict[str, Any]:
    """Return the fields of FP8: E4M3 forward and E5M2 for gradients ("hybrid"), except E4M3 throughout for blocks."""
    recipe, ends = optimizer.fp8_recipe(training), training.bf16_layers_at_ends
    if recipe is None:
        return {}
    fields: dict[str, Any] = {
        "fp8": "e4m3" if recipe == "blockwise" else "hybrid",
        "fp8_recipe": recipe,
        "fp8_param": training.fp8_param_gather,
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
    }
    if recipe == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields
