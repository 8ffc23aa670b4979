"""Qwen3 (dense): an RMSNorm on the queries and one on the keys of each head, no bias.

Checked against transformers ``Qwen3ForCausalLM``, vLLM ``models/qwen3.py``, Megatron ``GPTModel`` with
``qk_layernorm``.
"""

from __future__ import annotations

from functools import partial

from megatron_dagger.weights.families import decoder
from megatron_dagger.weights.families.base import Family

FAMILY = Family(
    name="qwen3",
    megatron=partial(decoder.megatron, qk_norm=True),
    vllm=partial(decoder.vllm, qk_norm=True),
    alternatives=decoder.INPUT_NORM | decoder.MLP_NORM,
)
