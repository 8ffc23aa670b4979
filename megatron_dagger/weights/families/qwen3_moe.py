"""Qwen3-MoE: Qwen3's attention; in every layer a router and experts, none of them shared.

Megatron's experts are ``TEGroupedMLP``'s ``mlp.experts.linear_fc1.weight{k}`` (gate, then up, as in the
dense MLP) and ``linear_fc2.weight{k}``; ``SequentialMLP`` calls the same
``mlp.experts.local_experts.{k}.linear_fc1.weight`` (``megatron/core/transformer/moe/experts.py``). Global
names count experts over all expert-parallel ranks; in a rank's module the numbers start from 0. The
norm before the router is not fused into a linear, since the router reads its output too.

Canonical tensors are those of the published checkpoints, one per expert; transformers 5 stacks them
when it loads them. vLLM's are ``RoutedExperts``' (see ``parameter.py``), checked against
``models/qwen3_moe.py``.
"""

from __future__ import annotations

from functools import partial

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Cut
from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import Family
from megatron_dagger.weights.families.megatron_tensor import Layout, Part
from megatron_dagger.weights.families.vllm_tensor import Parameter, Piece


def _sizes(model: ModelConfig) -> tuple[int, int, int]:
    """The hidden size, an expert's size, and how many experts there are."""
    assert model.num_moe_experts and model.moe_ffn_hidden_size, "ModelConfig checks it"
    return model.hidden_size, model.moe_ffn_hidden_size, model.num_moe_experts


def _experts(ours: str, theirs: str, model: ModelConfig) -> dict[str, Layout]:
    hidden, ffn, experts = _sizes(model)
    expert, norm = theirs + "mlp.experts.{}.", theirs + "post_attention_layernorm.weight"
    gate, up = (Part(name=f"{expert}{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    fc1 = Layout(parts=(gate, up), tail=(hidden,), cut=Cut.ROWS, experts=experts)
    fc2 = decoder.plain(expert + "down_proj.weight", hidden, (ffn,), cut=Cut.COLUMNS, experts=experts)
    return {
        ours + "pre_mlp_layernorm.weight": decoder.plain(norm, hidden),
        ours + "mlp.router.weight": decoder.plain(theirs + "mlp.gate.weight", experts, (hidden,)),
        ours + "mlp.experts.linear_fc1.weight{}": fc1,
        ours + "mlp.experts.linear_fc2.weight{}": fc2,
    }


def _expert_parameters(layer: str, model: ModelConfig) -> dict[str, Parameter]:
    hidden, ffn, experts = _sizes(model)
    expert, routed = layer + "mlp.experts.{}.", layer + "mlp.experts.routed_experts."
    gate, up = (Piece(name=f"{expert}{name}_proj.weight", rows=ffn) for name in ("gate", "up"))
    down = Piece(name=expert + "down_proj.weight", rows=hidden)
    return {
        **decoder.same(layer + "mlp.gate.weight", experts, (hidden,)),
        routed + "w13_weight": Parameter(pieces=(gate, up), tail=(hidden,), cut=Cut.ROWS, experts=experts),
        routed + "w2_weight": Parameter(pieces=(down,), tail=(ffn,), cut=Cut.COLUMNS, experts=experts),
    }


FAMILY = Family(
    name="qwen3_moe",
    megatron=partial(decoder.megatron, qk_norm=True, mlp=_experts),
    vllm=partial(decoder.vllm, qk_norm=True, mlp=_expert_parameters),
    alternatives=decoder.INPUT_NORM
    | {
        # the local spec's checkpoints have the dense layer's name for this norm
        r"\.mlp\.linear_fc1\.layer_norm_weight$": ".pre_mlp_layernorm.weight",
        r"\.local_experts\.(\d+)\.(linear_fc[12])\.weight$": r".\2.weight\1",
    },
)
