"""Llama (SmolLM2 too): no bias, no QK norm.

Checked against transformers ``LlamaForCausalLM``, vLLM ``models/llama.py``, Megatron ``GPTModel``.
"""

from __future__ import annotations

from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import Family

FAMILY = Family(
    name="llama",
    megatron=decoder.megatron,
    vllm=decoder.vllm,
    alternatives=decoder.INPUT_NORM | decoder.MLP_NORM,
)
