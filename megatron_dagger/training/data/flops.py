"""What a packed row costs: the model's FLOPs of its forward and backward pass, nothing recomputed or padded."""

from __future__ import annotations

import numpy as np

from megatron_dagger.config import ModelConfig
from megatron_dagger.training.data.packing import PackedDataset


def row_flops(data: PackedDataset, model: ModelConfig) -> np.ndarray:
    """(rows,) float64: 6 FLOPs a token for each weight that it meets (2 forward, 4 backward) and attention's.

    A pair of a token and one that it sees takes two products of a head's size in each head, 12 FLOPs with
    the backward pass. The output layer counts for label tokens, for which alone it is computed.
    """
    queries, keys = (heads * model.kv_channels for heads in (model.num_attention_heads, model.num_query_groups))
    layer = model.hidden_size * (2 * queries + 2 * keys + _mlp_width(model))
    per_token = 6.0 * model.num_layers * layer
    per_pair = 12.0 * model.num_layers * queries
    per_label = 6.0 * model.hidden_size * model.vocab_size
    return per_token * data.row_tokens + per_pair * data.row_pairs + per_label * data.row_label_tokens


def _mlp_width(model: ModelConfig) -> int:
    """The rows of gate, up and down that a token meets, and of the router."""
    if model.num_moe_experts is None:
        return 3 * model.ffn_hidden_size
    return 3 * model.moe_router_topk * (model.moe_ffn_hidden_size or 0) + model.num_moe_experts
