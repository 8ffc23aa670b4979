"""Builds Megatron-Core's GPTModel for a decoder of a known family, and fills it with layout-independent weights.

Layers are Transformer Engine's on a GPU in BF16 and FP8 (where prefixes are shared, with the attention in
``flex_attention``), else Megatron's local ones with the modules in ``local_modules``. Both have the same
names in a checkpoint.

Random weights are drawn per parameter from a seed made of the run's seed and the parameter's global
name, and then cut: the same seed gives the same model under every parallel layout.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dagger.config import ModelConfig, TrainingConfig, support
from megatron_dagger.training import compat, optimizer
from megatron_dagger.training import param_names as layout
from megatron_dagger.training.local_modules import RMSNorm, TokenRope, TreeAttention
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.decoder import EMBEDDING, OUTPUT_LAYER
from megatron_dagger.weights.families.megatron_tensor import Layout
from megatron_dagger.weights.layouts import padded_vocab_size

# Of a row's trees, each trunk and branch (local layers); its block mask, or its segments (Transformer Engine's).
Attention = Literal["trees", "blocks", "segments"]


def check_supported(model: ModelConfig, training: TrainingConfig) -> None:
    """Raise ConfigError for settings that this trainer cannot run on this machine."""
    support.check_supported(model, training, cuda=torch.cuda.is_available())


def uses_transformer_engine(training: TrainingConfig) -> bool:
    """Whether the layers are Transformer Engine's."""
    return support.uses_transformer_engine(training, cuda=torch.cuda.is_available())


def attention(training: TrainingConfig) -> Attention:
    """What the core attention is told of a row."""
    if not uses_transformer_engine(training):
        return "trees"
    return "blocks" if training.packing == "shared_prefix" else "segments"


def transformer_config(model: ModelConfig, training: TrainingConfig) -> TransformerConfig:
    """Megatron's config for this model, layout and precision on this machine."""
    config = compat.transformer_config(**settings(model, training, cuda=torch.cuda.is_available()))
    if model.yarn:  # which Megatron reads off attributes that are no fields
        for name, value in dataclasses.asdict(model.yarn).items():
            setattr(config, f"yarn_{'rotary_scaling_factor' if name == 'factor' else name}", value)
        for name, value in {"mscale": None, "mscale_all_dim": None, "correction_range_round_to_int": True}.items():
            setattr(config, f"yarn_{name}", value)
    return config


def settings(model: ModelConfig, training: TrainingConfig, *, cuda: bool) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig, with CUDA or on the CPU."""
    parallel = training.parallel
    engine = support.uses_transformer_engine(training, cuda=cuda)
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
        "qk_layernorm": model.family in ("qwen3", "qwen3_moe"),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": model.family == "qwen2",
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
        "calculate_per_token_loss": True,  # gradients are summed; the loss is normalised by itself
        "batch_p2p_comm": cuda,  # gloo delivers batched interleaved transfers to the wrong receive
        "use_cpu_initialization": not cuda,
        "apply_rope_fusion": engine and model.yarn is None,  # fused on packed rows it leaves out YaRN's mscale
        "bias_activation_fusion": engine,
        "bias_dropout_fusion": engine,
        "gradient_accumulation_fusion": False,  # wants APEX for the output layer
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
        "attention_softmax_in_fp32": True,
        **_experts(model, training, engine),
        **_recompute(training),
        **_fp8(training),
    }


def _experts(model: ModelConfig, training: TrainingConfig, engine: bool) -> dict[str, Any]:
    """No token is dropped and no auxiliary loss added: both would depend on what a micro-batch holds."""
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_topk": model.moe_router_topk,
        # the softmax of the chosen logits is that of all of them, the chosen ones made to sum to one
        "moe_router_pre_softmax": not model.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": engine,
        "moe_router_dtype": "fp32" if engine else None,
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
    """Transformer Engine's recipes as Megatron names them; but for blocks E4M3 forward and E5M2 for gradients."""
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


def build(model: ModelConfig, training: TrainingConfig, config: TransformerConfig) -> list[Any]:
    """This rank's model chunks (one, or one for each virtual pipeline stage), on this rank's device."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        where = {"ignore_virtual": False, "vp_stage": stage} if virtual else {}
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, attention(training), stage, virtual),
            vocab_size=padded_vocab_size(model, training.parallel.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**where),
            post_process=parallel_state.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="yarn" if model.yarn else "rope",
            rotary_base=model.rotary_base,
            vp_stage=stage if virtual else None,
        )
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:  # reduced and optimized apart also where EP is 1: a checkpoint is for any layout
                setattr(parameter, "allreduce", False)  # noqa: B010
        if attention(training) != "segments":
            TokenRope(chunk)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _layer_spec(config: TransformerConfig, attention: Attention, stage: int, virtual: int | None) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    if attention != "trees":
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if attention == "blocks":
            from megatron_dagger.training.flex_attention import TreeFlexAttention

            spec.submodules.self_attention.submodules.core_attention = TreeFlexAttention
        return spec
    spec = gpt_layer_specs.get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:  # the norm is fused into no linear: Transformer Engine's checkpoints call it so too
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    inner = spec.submodules.self_attention.submodules
    if config.qk_layernorm:
        inner.q_layernorm = RMSNorm
        inner.k_layernorm = RMSNorm
    inner.core_attention = TreeAttention
    layers = get_num_layers_to_build(config, vp_stage=stage if virtual else None)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def bare(chunk: Any) -> Any:
    """The GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@torch.no_grad()
def initialize_weights(chunks: list[Any], model: ModelConfig, seed: int) -> None:
    """Give every matrix its random values: normal, with Megatron's scaled std before a residual."""
    for chunk in chunks:
        for name, parameter in layout.global_parameters(bare(chunk)):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)  # else it is a norm's
                continue
            if name == OUTPUT_LAYER and model.tie_embeddings:
                name = EMBEDDING
            entry, own = lookup(model).layout(name, model), layout.own_shard(name)
            values = layout.cut(_random(name, entry, model, seed, own.size), entry, own)
            parameter.copy_(values)
            if hasattr(parameter, "get_high_precision_init_val"):  # an FP8 weight's, which its main copy begins with
                parameter.get_high_precision_init_val().copy_(values)


def _random(name: str, entry: Layout, model: ModelConfig, seed: int, size: int) -> torch.Tensor:
    """The full parameter ``name``; rows beyond the vocabulary are zero."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    residual = ".linear_proj.weight" in name or ".linear_fc2.weight" in name  # which an expert's number follows
    std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
    values = torch.randn(entry.shape, generator=generator) * std
    padding = padded_vocab_size(model, size) - model.vocab_size if entry.padded else 0
    return torch.nn.functional.pad(values, (0, 0, 0, padding))
