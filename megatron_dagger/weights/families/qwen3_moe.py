"""Qwen3-MoE: Qwen3's attention, and in every layer a router with experts, none of them shared.

Megatron names its experts ``mlp.experts.linear_fc1.weight{k}`` (gate, then up, as in the dense MLP) and
``linear_fc2.weight{k}`` in ``TEGroupedMLP``, and ``mlp.experts.local_experts.{k}.linear_fc1.weight`` in
``SequentialMLP`` (``megatron/core/transformer/moe/experts.py``). Global names count experts over all expert-parallel
ranks; a rank's module numbers its own from 0. The norm before the router is not fused into a linear layer, since the
router reads its output too.

Canonical tensors are those of published checkpoints, one per expert; transformers 5 stacks them on loading. vLLM's are
those of ``RoutedExperts`` (``vllm_tensor.py``; ``models/qwen3_moe.py``).
"""

from __future__ import annotations

from functools import partial

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import ShardDim
from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import WeightMap
from megatron_dagger.weights.families.megatron_tensor import FusedPart, MegatronTensor
from megatron_dagger.weights.families.vllm_tensor import StackedPart, VllmTensor


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Return the hidden size, the size of an expert and the number of experts."""
    assert model.num_moe_experts and model.moe_ffn_hidden_size, "ModelConfig checks it"
    return model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts


def _experts(mcore: str, hf: str, model: ModelConfig) -> dict[str, MegatronTensor]:
    hidden, ffn, experts = _sizes(model)
    expert, norm = hf + "mlp.experts.{}.", hf + "post_attention_layernorm.weight"
    gate, up = (FusedPart(name=f"{expert}{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    fc1 = MegatronTensor(parts=(gate, up), tail=(hidden,), shard_dim=ShardDim.ROWS, experts=experts)
    fc2 = decoder.megatron_single(
        expert + "down_proj.weight", hidden, (ffn,), shard_dim=ShardDim.COLUMNS, experts=experts
    )
    return {
        mcore + "pre_mlp_layernorm.weight": decoder.megatron_single(norm, hidden),
        mcore + "mlp.router.weight": decoder.megatron_single(hf + "mlp.gate.weight", experts, (hidden,)),
        mcore + "mlp.experts.linear_fc1.weight{}": fc1,
        mcore + "mlp.experts.linear_fc2.weight{}": fc2,
    }


def _expert_parameters(layer: str, model: ModelConfig) -> dict[str, VllmTensor]:
    hidden, ffn, experts = _sizes(model)
    expert, routed = layer + "mlp.experts.{}.", layer + "mlp.experts.routed_experts."
    gate, up = (StackedPart(name=f"{expert}{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    down = StackedPart(name=expert + "down_proj.weight", rows=hidden)
    return {
        **decoder.vllm_single(layer + "mlp.gate.weight", experts, (hidden,)),
        routed + "w13_weight": VllmTensor(parts=(gate, up), tail=(hidden,), shard_dim=ShardDim.ROWS, experts=experts),
        routed + "w2_weight": VllmTensor(parts=(down,), tail=(ffn,), shard_dim=ShardDim.COLUMNS, experts=experts),
    }


WEIGHT_MAP = WeightMap(
    megatron=partial(decoder.megatron, mlp=_experts),
    vllm=partial(decoder.vllm, mlp=_expert_parameters),
    alternatives=decoder.INPUT_NORM
    | {
        # in checkpoints of the local spec this norm has the dense layer's name
        r"\.mlp\.linear_fc1\.layer_norm_weight$": ".pre_mlp_layernorm.weight",
        r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$": r".\2.weight\1",
    },
)
