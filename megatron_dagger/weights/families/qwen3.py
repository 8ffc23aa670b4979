"""Qwen3 (dense).

Sources: transformers ``Qwen3ForCausalLM``, vLLM ``models/qwen3.py``, Megatron ``GPTModel`` with ``qk_layernorm``.
"""

from __future__ import annotations

from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import WeightMap

WEIGHT_MAP = WeightMap(
    megatron=decoder.megatron,
    vllm=decoder.vllm,
    alternatives=decoder.INPUT_NORM | decoder.MLP_NORM,
)
