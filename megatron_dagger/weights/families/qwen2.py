"""Qwen2 and Qwen2.5 (dense): biases on Q, K and V, none elsewhere.

Checked against transformers ``Qwen2ForCausalLM``, vLLM ``models/qwen2.py``, Megatron ``GPTModel`` with
``add_qkv_bias``.
"""

from __future__ import annotations

from functools import partial

from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import Family

FAMILY = Family(
    name="qwen2",
    megatron=partial(decoder.megatron, qkv_bias=True),
    vllm=partial(decoder.vllm, qkv_bias=True),
    alternatives=decoder.INPUT_NORM | decoder.MLP_NORM,
)
