"""The model families that can be trained, by their differences from a plain decoder.

The plain decoder has RMSNorm, SwiGLU, GQA and RoPE. Whatever depends on the family (the settings, the trainer, the
weight map, the planner) asks this table, mostly through the properties of ``ModelConfig``. A new family is an entry
here and a weight map of the same name in ``weights/families``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family."""

    hf_architecture: str  # of its config.json
    qk_norm: bool = False  # RMSNorm on the queries and keys of each head
    qkv_bias: bool = False  # biases on Q, K and V
    experts: bool = False  # a mixture of experts (no shared ones) instead of the MLP in every layer
    hf_head_dim: bool = True  # config.json has head_dim; False: a head's size is hidden_size / num_attention_heads
    heads_divide_hidden: bool = False  # required by transformers
    hf_entries: Mapping[str, Any] = field(default_factory=dict)  # constant entries of its config.json


FAMILIES: Mapping[str, Family] = {
    "llama": Family(  # SmolLM2 too
        hf_architecture="LlamaForCausalLM",
        heads_divide_hidden=True,
        # LlamaConfig's own defaults are the ids of Llama 2's tokenizer
        hf_entries={"attention_bias": False, "mlp_bias": False, "bos_token_id": None, "eos_token_id": None},
    ),
    "qwen2": Family(  # Qwen2.5 too
        hf_architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        hf_head_dim=False,
        hf_entries={"use_sliding_window": False},
    ),
    "qwen3": Family(
        hf_architecture="Qwen3ForCausalLM",
        qk_norm=True,
        hf_entries={"attention_bias": False, "use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        hf_architecture="Qwen3MoeForCausalLM",
        qk_norm=True,
        experts=True,
        hf_entries={"attention_bias": False, "use_sliding_window": False},
    ),
}
