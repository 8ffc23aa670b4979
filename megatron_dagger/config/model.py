"""The student's architecture, in Megatron-Core's words, and the same in Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A dense decoder of the Qwen3 family (RMSNorm, SwiGLU, GQA, QK norm, RoPE)."""

    family: Literal["qwen3"] = "qwen3"
    num_layers: int = 4
    hidden_size: int = 128
    ffn_hidden_size: int = 384
    num_attention_heads: int = 4
    num_query_groups: int = 2  # key and value heads
    kv_channels: int = 32  # the size of a head
    vocab_size: int = 1024  # the tokenizer's, unpadded
    max_position_embeddings: int = 4096
    rotary_base: int = 1_000_000
    layernorm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "kv_channels"):
            require(getattr(self, name) > 0, f"model.{name} must be positive, got {getattr(self, name)}")
        require(
            self.num_query_groups > 0 and self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_query_groups={self.num_query_groups} must divide "
            f"model.num_attention_heads={self.num_attention_heads}",
        )
        require(self.kv_channels % 2 == 0, f"model.kv_channels={self.kv_channels} must be even (RoPE)")

    def hf_config(self) -> dict[str, Any]:
        """The content of a Hugging Face ``config.json`` for this model (Qwen3ForCausalLM)."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "head_dim": self.kv_channels,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": float(self.rotary_base),
            "rms_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "torch_dtype": "float32",
        }
