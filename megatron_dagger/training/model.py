"""Builds Megatron-Core's GPTModel for a decoder of a known family, and gives it random weights.

A parameter's random values are drawn from a seed made of the run's seed and the parameter's global name, and then cut
for this rank: the same seed gives the same model under every parallel layout.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dagger.config import ModelConfig, TrainingConfig
from megatron_dagger.training import param_names
from megatron_dagger.training.local_spec import local_spec
from megatron_dagger.training.megatron_config import Attention, attention_kind
from megatron_dagger.training.tree_attention import TokenRope
from megatron_dagger.weights.families import lookup
from megatron_dagger.weights.families.decoder import EMBEDDING, OUTPUT_LAYER
from megatron_dagger.weights.families.megatron_tensor import MegatronTensor
from megatron_dagger.weights.layouts import padded_vocab_size


def build(model: ModelConfig, training: TrainingConfig, config: TransformerConfig) -> list[Any]:
    """Return this rank's model chunks on its device: one, or one per virtual pipeline stage."""
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.module import Float16Module

    attention = attention_kind(training)
    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        position = {"ignore_virtual": False, "vp_stage": stage} if virtual else {}
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=_layer_spec(config, attention, vp_stage),
            vocab_size=padded_vocab_size(model, training.parallel.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**position),
            post_process=parallel_state.is_pipeline_last_stage(**position),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="yarn" if model.yarn else "rope",
            rotary_base=model.rotary_base,
            vp_stage=vp_stage,
        )
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:  # reduced and optimized separately even if EP is 1: a checkpoint fits any layout
                setattr(parameter, "allreduce", False)  # noqa: B010
        if attention != "segments":
            TokenRope(chunk)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _layer_spec(config: TransformerConfig, attention: Attention, vp_stage: int | None) -> Any:
    if attention == "trees":
        return local_spec(config, vp_stage)
    from megatron.core.models.gpt import gpt_layer_specs

    spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if attention == "blocks":
        from megatron_dagger.training.flex_attention import TreeFlexAttention

        spec.submodules.self_attention.submodules.core_attention = TreeFlexAttention
    return spec


def bare(chunk: Any) -> Any:
    """Return the GPTModel inside Megatron's wrappers (DDP, Float16Module)."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@torch.no_grad()
def initialize_weights(chunks: list[Any], model: ModelConfig, seed: int) -> None:
    """Fill the chunks' parameters: matrices from a normal distribution, norms with 1, biases with 0."""
    for chunk in chunks:
        for name, parameter in param_names.global_parameters(bare(chunk)):
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
                continue
            if name == OUTPUT_LAYER and model.tie_embeddings:
                name = EMBEDDING
            layout, shard = lookup(model).megatron_tensor(name, model), param_names.own_shard(name)
            values = param_names.cut(_random(name, layout, model, seed, shard.size), layout, shard)
            parameter.copy_(values)
            if hasattr(parameter, "get_high_precision_init_val"):  # FP8 weights: their main copy starts from this
                parameter.get_high_precision_init_val().copy_(values)


def _random(name: str, layout: MegatronTensor, model: ModelConfig, seed: int, size: int) -> torch.Tensor:
    """Return random values of the full parameter ``name``, with zero rows that pad a vocabulary for ``size`` ranks.

    The projections before a residual have Megatron's scaled std, ``init_std / sqrt(2 * num_layers)``.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    residual = ".linear_proj.weight" in name or ".linear_fc2.weight" in name  # an expert's number may follow
    std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
    values = torch.randn(layout.shape, generator=generator) * std
    padding = padded_vocab_size(model, size) - model.vocab_size if layout.padded else 0
    return torch.nn.functional.pad(values, (0, 0, 0, padding))
