"""Qwen2 and Qwen2.5 (dense).

Sources: transformers ``Qwen2ForCausalLM``, vLLM ``models/qwen2.py``, Megatron ``GPTModel`` with ``add_qkv_bias``.
"""

from __future__ import annotations

from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import WeightMap

WEIGHT_MAP = WeightMap(
    megatron=decoder.megatron,
    vllm=decoder.vllm,
    alternatives=decoder.INPUT_NORM | decoder.MLP_NORM,
)
