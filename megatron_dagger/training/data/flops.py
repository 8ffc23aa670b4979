"""The model's FLOPs for a packed row, forward and backward, without recomputation and padding."""

from __future__ import annotations

import numpy as np

from megatron_dagger.config import ModelConfig
from megatron_dagger.training.data.packing import PackedDataset


def row_flops(data: PackedDataset, model: ModelConfig) -> np.ndarray:
    """Return the FLOPs of each row, (rows,) float64.

    A weight costs 6 FLOPs per token that it is applied to: 2 forward and 4 backward. Attention costs 12 FLOPs per
    (query, key) pair, head and head dimension: two products (QK^T and PV) of 2 FLOPs each, forward plus twice that
    backward. The output layer is computed for label tokens only.
    """
    queries, keys = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    layer = model.hidden_size * (2 * queries + 2 * keys + _mlp_width(model))
    per_token = 6.0 * model.num_layers * layer
    per_pair = 12.0 * model.num_layers * queries
    per_label = 6.0 * model.hidden_size * model.vocab_size
    return per_token * data.row_tokens + per_pair * data.row_pairs + per_label * data.row_label_tokens


def _mlp_width(model: ModelConfig) -> int:
    """Return the rows of gate, up and down projections, and of the router, that are applied to a token."""
    if model.num_moe_experts is None:
        return 3 * model.ffn_hidden_size
    return 3 * model.moe_router_topk * (model.moe_ffn_hidden_size or 0) + model.num_moe_experts
