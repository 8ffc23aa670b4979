"""The exact number of parameters that a rank of the trainer, or a worker of the engine, holds.

The shapes are those of Megatron-Core's GPTModel: Q, K and V in one matrix, gate and up projection in another,
norms and routers on every tensor-parallel rank; with tied embeddings and a pipeline the last stage has a copy.
Expert parallelism distributes whole experts; expert tensor parallelism splits each one.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dagger.config.model import VLLM_VOCAB_MULTIPLE, ModelConfig, padded_vocab_size
from megatron_dagger.config.training import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of one rank. ``matrices`` and ``experts`` are the layers' linears, which FP8 converts."""

    matrices: int
    experts: int
    vocabulary: int
    small: int  # norms, biases and routers

    @property
    def linears(self) -> int:
        return self.matrices + self.experts

    @property
    def total(self) -> int:
        return self.linears + self.vocabulary + self.small


def dense_matrices(model: ModelConfig) -> int:
    """Return the weights of a layer's linears that every token passes, summed over tensor-parallel ranks."""
    queries = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    attention = model.hidden_size * (queries + 2 * keys) + queries * model.hidden_size
    return attention + (0 if model.num_moe_experts else 3 * model.hidden_size * model.ffn_hidden_size)


def layer_experts(model: ModelConfig) -> int:
    """Return the weights of all experts of a layer."""
    return (model.num_moe_experts or 0) * expert_matrices(model)


def expert_matrices(model: ModelConfig) -> int:
    """Return the weights of one expert: gate, up and down."""
    return 3 * model.hidden_size * (model.moe_ffn_hidden_size or 0)


def router_weights(model: ModelConfig) -> int:
    """Return the weights of a layer's router; 0 for a dense model."""
    return (model.num_moe_experts or 0) * model.hidden_size


def total_parameters(model: ModelConfig) -> int:
    """Return the model's parameters as published: without padding, tied embeddings counted once."""
    return _parameters(model, layer_experts(model))


def active_parameters(model: ModelConfig) -> int:
    """Return the parameters that a token passes: those of ``moe_router_topk`` experts per layer, and all others."""
    return _parameters(model, model.moe_router_topk * expert_matrices(model))


def _parameters(model: ModelConfig, experts: int) -> int:
    tables = 1 if model.tie_embeddings else 2
    vocabulary = tables * model.vocab_size * model.hidden_size
    per_layer = dense_matrices(model) + experts + _layer_small(model, 1)
    return model.num_layers * per_layer + model.hidden_size + vocabulary


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> Parameters:
    """Return the parameters on each rank of pipeline stage ``stage``, over all of its virtual stages."""
    tp, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers, first, last = model.num_layers // stages, stage == 0, stage == stages - 1
    own_output = last and not (model.tie_embeddings and first)
    table = padded_vocab_size(model, tp) // tp * model.hidden_size
    expert_ranks = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    return Parameters(
        matrices=layers * dense_matrices(model) // tp,
        experts=layers * layer_experts(model) // expert_ranks,
        vocabulary=table * (first + own_output),
        small=layers * _layer_small(model, tp) + (model.hidden_size if last else 0),
    )


def worker_parameters(model: ModelConfig, tensor_parallel_size: int) -> Parameters:
    """Return the parameters on each tensor-parallel worker of vLLM.

    With fewer KV heads than workers, each worker has a copy of one head.

    The number of expert weights is the same whether experts are split over the workers or, with
    ``enable_expert_parallel``, distributed whole (``FusedMoEParallelConfig.make``).
    """
    tp = tensor_parallel_size
    copies = max(tp, model.num_query_groups) - model.num_query_groups  # of KV heads, over all workers
    rows = -(-model.vocab_size // VLLM_VOCAB_MULTIPLE) * VLLM_VOCAB_MULTIPLE
    layer = dense_matrices(model) + 2 * copies * model.kv_channels * model.hidden_size
    return Parameters(
        matrices=model.num_layers * layer // tp,
        experts=model.num_layers * layer_experts(model) // tp,
        vocabulary=-(-rows // tp) * model.hidden_size * (1 if model.tie_embeddings else 2),
        small=model.num_layers * _layer_small(model, tp) + model.hidden_size,
    )


def _layer_small(model: ModelConfig, tp: int) -> int:
    """Return norms and router, which are whole on every rank, and a rank's biases of Q, K and V."""
    norms = 2 * model.hidden_size + (2 * model.kv_channels if model.qk_norm else 0)
    heads = model.num_attention_heads + 2 * model.num_query_groups
    return norms + router_weights(model) + (heads * model.kv_channels // tp if model.qkv_bias else 0)
