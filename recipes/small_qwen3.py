"""The student of the repair recipes, which two CPU cores train in minutes."""

from __future__ import annotations

from megatron_dagger.config import ModelConfig


def small_qwen3(tokens: int) -> ModelConfig:
    """Return a Qwen3 of 0.5M parameters for conversations of up to ``tokens`` tokens."""
    return ModelConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=32,
        vocab_size=1024,
        max_position_embeddings=tokens,
        rotary_base=10_000,
        init_std=0.07,  # near 1 / sqrt(hidden_size); with 0.02 a model this narrow learns half as fast
    )
