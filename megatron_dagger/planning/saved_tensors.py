"""What one layer keeps for its backward pass, tensor by tensor: a table per layer specification.

After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198,
section 4), but for GQA, SwiGLU, per-head norms, experts and fused attention, whose scores are never stored, and
for micro-batches of one packed row. The local layers' tables are what ``torch.autograd`` was seen to save (a test
measures them); Transformer Engine's are read off its sources and Megatron-Core's, and were not measured.

Experts: a token's ``moe_router_topk`` copies go to the ranks of its experts (``MoEAlltoAllTokenDispatcher``), none
is dropped, and a rank gets as many as it sends where the experts are equally asked for, ``expert_load`` times as
many where they are not. The few tokens that fill an expert's up to what FP8 wants are left out.

Not in it: with ``training.packing=shared_prefix`` each branch also keeps a copy of its prefix's keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.config.training import RecomputeModule, TrainingConfig

FP32, INDEX = 4, 8  # bytes


class Split(Enum):
    """What a saved tensor is cut by: always by tensor parallelism, only with sequence parallelism, never."""

    TENSOR = "tensor"
    SEQUENCE = "sequence"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class SavedTensor:
    """A tensor of a layer that is kept for the backward pass: ``bytes`` per token of the row, over all ranks.

    With any of ``modules`` in ``training.recompute_modules`` it is recomputed instead, and not kept.
    """

    name: str
    bytes: float
    split: Split = Split.TENSOR
    modules: tuple[RecomputeModule, ...] = ()

    def here(self, training: TrainingConfig) -> float:
        """Bytes per token of the row on one rank."""
        parallel = training.parallel
        cut = self.split is Split.TENSOR or (self.split is Split.SEQUENCE and parallel.sequence_parallel)
        return self.bytes / (parallel.tensor_model_parallel_size if cut else 1)


def layer_tensors(
    model: ModelConfig, training: TrainingConfig, *, engine: bool, expert_load: float = 1.0
) -> tuple[SavedTensor, ...]:
    """What one layer keeps; ``engine``: with Transformer Engine's layers, else with the local ones."""
    attention = (_engine_attention if engine else _local_attention)(model, training)
    if model.num_moe_experts is None:
        return attention + (_engine_mlp if engine else _local_mlp)(model, training)
    load = expert_load if training.parallel.expert_model_parallel_size > 1 else 1.0
    return attention + (_engine_experts if engine else _local_experts)(model, training, load)


def _engine_attention(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """LayerNormLinear, RMSNorm of Q and K, fused RoPE, fused attention on THD, Linear. FP8 keeps a linear's input
    in one byte, and the attention's output besides in two."""
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
    if _per_head_norms(model):
        tensors.append(SavedTensor(name="inputs of Q's and K's norms", bytes=2 * (queries + keys)))
    if linear == 1:
        tensors.append(SavedTensor(name="input of the projection in FP8", bytes=queries))
    return tuple(tensors)


def _engine_mlp(model: ModelConfig, training: TrainingConfig) -> tuple[SavedTensor, ...]:
    """LayerNormLinear, fused SwiGLU, Linear."""
    hidden, ffn, linear = model.hidden_size, model.ffn_hidden_size, _linear_input(training)
    return (
        SavedTensor(name="input of the MLP's norm", bytes=2 * hidden, split=Split.SEQUENCE),
        SavedTensor(name="input of gate and up", bytes=linear * hidden, split=Split.SEQUENCE, modules=("mlp",)),
        SavedTensor(name="gate and up", bytes=2 * 2 * ffn, modules=("mlp",)),
        SavedTensor(name="input of down", bytes=linear * ffn, modules=("mlp",)),
    )


def _engine_experts(model: ModelConfig, training: TrainingConfig, load: float) -> tuple[SavedTensor, ...]:
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
    """Megatron's local layers with ``training.local_modules``: norms in fp32 that keep their normalised input,
    unfused RoPE, PyTorch's attention."""
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
    if _per_head_norms(model):
        heads = model.num_attention_heads + model.num_query_groups
        # The norms take views of QKV where they can: in BF16 they make a copy in fp32, and with several groups on
        # a rank Q's heads do not stand side by side.
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
    """SequentialMLP: expert after expert, unfused SwiGLU, which is then multiplied by the token's weight."""
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
    """The chosen experts and their softmax (``topk_routing_with_score_function``); which token chose which, with
    what weight, and in which order they are dispatched (``permute``)."""
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
    """Of a token of the row, the copies that experts get, and the inner values (MLP's width) of these.

    Ranks that share experts (expert tensor parallelism) get each other's tokens as well.
    """
    copies = load * model.moe_router_topk
    return copies * training.parallel.expert_tensor_parallel_size, copies * (model.moe_ffn_hidden_size or 0)


def itemsize(training: TrainingConfig) -> int:
    return FP32 if training.precision == "fp32" else 2


def _linear_input(training: TrainingConfig) -> int:
    """Bytes a value of what Transformer Engine's linears keep."""
    return 1 if training.precision.startswith("fp8") else 2


def _local_norm(hidden: int) -> int:
    """Input, normalised input, 1 / rms."""
    return 2 * FP32 * hidden + FP32


def _per_head_norms(model: ModelConfig) -> bool:
    return model.family.startswith("qwen3")


def _widths(model: ModelConfig) -> tuple[int, int, int]:
    """hidden size, width of all queries, of all keys."""
    head = model.kv_channels
    return model.hidden_size, model.num_attention_heads * head, model.num_query_groups * head
