"""The tensors that one layer keeps for its backward pass: a table per layer specification.

Based on Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
section 4), but for GQA, SwiGLU, per-head norms, experts, fused attention, whose scores are never stored, and
micro-batches of one packed row. A test measures the local layers' tables against ``torch.autograd``. Transformer
Engine's tables come from reading its sources and Megatron-Core's, and were not measured.

Experts: a token's ``moe_router_topk`` copies go to the ranks of its experts (``MoEAlltoAllTokenDispatcher``), and none
is dropped. A rank receives as many copies as it sends if the experts are used equally, and ``expert_load`` times as
many if not. The few tokens that pad an expert's input for FP8 are not counted.

Not counted either: with ``training.packing=shared_prefix`` each branch keeps a copy of its prefix's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.training import RecomputeModule, TrainingConfig

FP32, INDEX = 4, 8  # bytes


class Split(Enum):
    """How tensor-parallel ranks share a saved tensor: always, only with sequence parallelism, or never."""

    TENSOR = "tensor"
    SEQUENCE = "sequence"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor that a layer keeps for the backward pass: ``bytes`` per token of the row, summed over all ranks.

    If any of ``modules`` is in ``training.recompute_modules``, the tensor is recomputed instead of kept.
    """

    name: str
    bytes: float
    split: Split = Split.TENSOR
    modules: tuple[RecomputeModule, ...] = ()

    def per_rank(self, training: TrainingConfig) -> float:
        """Return the bytes per token of the row on one rank."""
        parallel = training.parallel
        is_split = self.split is Split.TENSOR or (self.split is Split.SEQUENCE and parallel.sequence_parallel)
        return self.bytes / (parallel.tensor_model_parallel_size if is_split else 1)


def layer_tensors(
    model: ModelConfig, training: TrainingConfig, *, te: bool, expert_load: float = 1.0
) -> tuple[SavedTensor, ...]:
    """Return the tensors that one layer keeps: Transformer Engine's layer with ``te``, else the local one."""
    attention = (_te_attention if te else _local_attention)(model, training)
    if model.num_moe_experts is None:
        return attention + (_te_mlp if te else _local_mlp)(model, training)
    load = expert_load if training.parallel.expert_model_parallel_size > 1 else 1.0
    return attention + (_te_experts if te else _local_experts)(model, training, load)


def _te_attention(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """LayerNormLinear, RMSNorm of Q and K, fused RoPE, fused attention on THD, Linear.

    FP8 keeps a linear's input in one byte, and the attention's output also in two.
    """
    hidden, queries, keys = _widths(model)
    linear = _linear_input(training)
    tensors = [
        SavedTensor(name="input of the attention's norm", bytes=2 * hidden, split=Split.SEQUENCE),
        SavedTensor(name="input of QKV", bytes=linear * hidden, split=Split.SEQUENCE),
        SavedTensor(name="QKV, which V is a view of", bytes=2 * (queries + 2 * keys)),
        SavedTensor(name="Q and K with RoPE", bytes=2 * (queries + keys)),
        SavedTensor(name="attention", bytes=2 * queries),
        SavedTensor(name="log-sum-exp", bytes=FP32 * model.num_attention_heads, modules=("core_attn",)),
    ]
    if model.qk_norm:
        tensors.append(SavedTensor(name="inputs of Q's and K's norms", bytes=2 * (queries + keys)))
    if linear == 1:
        tensors.append(SavedTensor(name="input of the projection in FP8", bytes=queries))
    return tuple(tensors)


def _te_mlp(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """LayerNormLinear, fused SwiGLU, Linear."""
    hidden, ffn, linear = model.hidden_size, model.ffn_hidden_size, _linear_input(training)
    return (
        SavedTensor(name="input of the MLP's norm", bytes=2 * hidden, split=Split.SEQUENCE),
        SavedTensor(name="input of gate and up", bytes=linear * hidden, split=Split.SEQUENCE, modules=("mlp",)),
        SavedTensor(name="gate and up", bytes=2 * 2 * ffn, modules=("mlp",)),
        SavedTensor(name="input of down", bytes=linear * ffn, modules=("mlp",)),
    )


def _te_experts(model: ModelConfig, training: TrainingConfig, load: float) -> tuple[SavedTensor, ...]:
    """RMSNorm, the router in fp32, and TEGroupedMLP: GroupedLinear, SwiGLU times the token's weight, GroupedLinear."""
    hidden, linear = model.hidden_size, _linear_input(training)
    gathered, inner = _routed(model, training, load)
    return (
        SavedTensor(name="input of the MLP's norm", bytes=2 * hidden, split=Split.SEQUENCE),
        SavedTensor(name="input of router and experts", bytes=2 * hidden, split=Split.SEQUENCE, modules=("layernorm",)),
        *_router(model, size=FP32),
        SavedTensor(name="weights of dispatched tokens", bytes=FP32 * gathered, split=Split.SEQUENCE, modules=("moe",)),
        SavedTensor(name="dispatched", bytes=linear * gathered * hidden, split=Split.SEQUENCE, modules=("moe",)),
        SavedTensor(name="experts' gate and up", bytes=2 * 2 * inner, modules=("moe",)),
        SavedTensor(name="input of experts' down", bytes=linear * inner, modules=("moe", "moe_act")),
    )


def _local_attention(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """Megatron's local layers with our modules: fp32 norms that keep their normalised input, unfused RoPE, SDPA."""
    hidden, queries, keys = _widths(model)
    size = itemsize(training)
    tensors = [
        SavedTensor(name="attention's norm", bytes=_local_norm(hidden), split=Split.SEQUENCE),
        SavedTensor(name="input of QKV", bytes=size * hidden, split=Split.SEQUENCE),
        SavedTensor(name="QKV, which V is a view of", bytes=size * (queries + 2 * keys)),
        SavedTensor(name="cosines and sines for Q and K", bytes=4 * size * model.kv_channels, split=Split.NONE),
        SavedTensor(name="Q and K with RoPE", bytes=size * (queries + keys)),
        SavedTensor(name="attention", bytes=size * queries, modules=("core_attn",)),
        SavedTensor(name="log-sum-exp", bytes=FP32 * model.num_attention_heads, modules=("core_attn",)),
        SavedTensor(name="input of the projection", bytes=size * queries),
    ]
    if model.qk_norm:
        heads = model.num_attention_heads + model.num_query_groups
        # The norms take views of QKV if possible. In BF16 they make a copy in fp32; with several groups on a rank
        # Q's heads are not adjacent, and Q is copied.
        alone = model.num_query_groups == training.parallel.tensor_model_parallel_size
        copies = queries + keys if size != FP32 else 0 if alone else queries
        tensors.append(SavedTensor(name="Q's and K's norms", bytes=FP32 * (copies + queries + keys + heads)))
    return tuple(tensors)


def _local_mlp(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """Unfused SwiGLU."""
    hidden, ffn, size = model.hidden_size, model.ffn_hidden_size, itemsize(training)
    return (
        SavedTensor(name="MLP's norm", bytes=_local_norm(hidden), split=Split.SEQUENCE),
        SavedTensor(name="input of gate and up", bytes=size * hidden, split=Split.SEQUENCE),
        SavedTensor(name="gate and up", bytes=size * 2 * ffn, modules=("mlp",)),
        SavedTensor(name="gate after SiLU, up, input of down", bytes=size * 3 * ffn, modules=("mlp",)),
    )


def _local_experts(model: ModelConfig, training: TrainingConfig, load: float) -> tuple[SavedTensor, ...]:
    """SequentialMLP: one expert after the other, unfused SwiGLU, multiplied by the token's weight."""
    hidden, size = model.hidden_size, itemsize(training)
    gathered, inner = _routed(model, training, load)
    return (
        SavedTensor(name="MLP's norm", bytes=_local_norm(hidden), split=Split.SEQUENCE),
        SavedTensor(name="input of router and experts", bytes=size * hidden, split=Split.SEQUENCE),
        *_router(model, size=size),
        SavedTensor(name="weights of dispatched tokens", bytes=size * gathered, split=Split.SEQUENCE, modules=("moe",)),
        SavedTensor(name="dispatched", bytes=size * gathered * hidden, split=Split.SEQUENCE, modules=("moe",)),
        SavedTensor(name="experts' gate and up", bytes=size * 2 * inner, modules=("moe",)),
        SavedTensor(name="gate after SiLU, up, product, input of down", bytes=size * 4 * inner, modules=("moe",)),
    )


def _router(model: ModelConfig, *, size: int) -> tuple[SavedTensor, ...]:
    """The chosen experts and their softmax (``topk_routing_with_score_function``), and the dispatch (``permute``).

    The dispatch keeps a map of tokens to experts with the weights, and the order of the dispatched tokens.
    """
    topk, experts = model.moe_router_topk, model.num_moe_experts or 0
    return tuple(
        SavedTensor(name=name, bytes=count, split=Split.SEQUENCE, modules=("moe",))
        for name, count in {
            "chosen experts and their weights": (INDEX + FP32) * topk,
            "map of tokens to experts": (1 + size) * experts,
            "order of dispatched tokens": INDEX * topk,
        }.items()
    )


def _routed(model: ModelConfig, training: TrainingConfig, load: float) -> tuple[float, float]:
    """Return, per token of the row, the copies that experts receive and the inner values (MLP's width) of the copies.

    Ranks that share experts (expert tensor parallelism) also receive each other's tokens.
    """
    copies = load * model.moe_router_topk
    return copies * training.parallel.expert_tensor_parallel_size, copies * (model.moe_ffn_hidden_size or 0)


def itemsize(training: TrainingConfig) -> int:
    """Return the bytes of one activation value."""
    return FP32 if training.precision == "fp32" else 2


def _linear_input(training: TrainingConfig) -> int:
    """Return the bytes of one value in the input that Transformer Engine's linears keep."""
    return 1 if training.precision.startswith("fp8") else 2


def _local_norm(hidden: int) -> int:
    """Return the bytes per token of a local norm: input, normalised input, 1 / rms."""
    return 2 * FP32 * hidden + FP32


def _widths(model: ModelConfig) -> tuple[int, int, int]:
    """Return the hidden size, the width of all queries and the width of all keys."""
    head = model.kv_channels
    return model.hidden_size, model.num_attention_heads * head, model.num_query_groups * head
