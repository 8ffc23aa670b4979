"""The student's architecture under Megatron-Core's names, and its conversion to and from Hugging Face's config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_dagger.config.base import ConfigError, build, check_numbers, number, require
from megatron_dagger.config.families import FAMILIES
from megatron_dagger.config.hf_entries import check_plain, count, entry, experts, head_size, rope_entries

VLLM_VOCAB_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE in vllm/model_executor/layers/vocab_parallel_embedding.py
_VOCAB_MULTIPLE = 128  # Megatron's; it gives the same padding for every power-of-two tensor-parallel size


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """RoPE scaled for longer sequences (YaRN, arXiv 2309.00071), as in Qwen3 beyond 32,768 tokens."""

    factor: float = number(4.0, gt=1)
    original_max_position_embeddings: int = number(32_768, gt=0)
    beta_fast: float = number(32.0, gt=0)
    beta_slow: float = number(1.0, gt=0)

    def __post_init__(self) -> None:
        check_numbers(self, "model.yarn")
        require(
            self.beta_fast > self.beta_slow,
            f"model.yarn.beta_fast={self.beta_fast} must be greater than model.yarn.beta_slow={self.beta_slow}",
        )

    def hf_rope_scaling(self) -> dict[str, Any]:
        """Return the content of ``rope_scaling`` in a config.json."""
        return {"rope_type": "yarn", **{setting.name: getattr(self, setting.name) for setting in fields(self)}}

    @classmethod
    def from_hf(cls, rope: dict[str, Any], max_position_embeddings: int) -> YarnConfig:
        """Return the settings from ``rope_scaling`` in a config.json.

        Without an original length it is the model's, as in Transformers. Raises ConfigError for unsupported entries and
        without a factor, which has no default there.
        """
        names = {setting.name for setting in fields(cls)}
        others = {
            k: v for k, v in rope.items() if k not in {*names, "rope_type", "type", "rope_theta"} and v is not None
        }
        require(not others, f"rope_scaling={others} is not supported with rope_type='yarn'")
        require(rope.get("factor") is not None, "rope_scaling has no factor, which rope_type='yarn' needs")
        settings = {name: rope[name] for name in names & rope.keys() if rope[name] is not None}
        return build(cls, {"original_max_position_embeddings": max_position_embeddings} | settings, "rope_scaling")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder with RMSNorm, SwiGLU, GQA and RoPE (plain or YaRN), of a family in ``families.FAMILIES``.

    A family with experts has them in every layer; ``ffn_hidden_size`` is not used there.
    """

    family: str = field(default="qwen3", metadata={"choices": FAMILIES})  # llama: SmolLM2 too; qwen2: Qwen2.5 too
    num_layers: int = number(4, gt=0)
    hidden_size: int = number(128, gt=0)
    ffn_hidden_size: int = number(384, gt=0)
    num_attention_heads: int = number(4, gt=0)
    num_query_groups: int = number(2, gt=0)  # key and value heads
    kv_channels: int = number(32, gt=0)  # the size of a head
    vocab_size: int = number(1024, gt=0)  # the tokenizer's, unpadded
    max_position_embeddings: int = number(4096, gt=0)
    rotary_base: int = number(1_000_000, gt=1)
    yarn: YarnConfig | None = None  # scaling of RoPE; null: none
    layernorm_epsilon: float = number(1e-6, gt=0)
    tie_embeddings: bool = True
    init_std: float = number(0.02, ge=0)
    num_moe_experts: int | None = number(None, gt=0)  # this and the next: required with experts, refused without
    moe_ffn_hidden_size: int | None = number(None, gt=0)  # of one expert
    moe_router_topk: int = number(2, gt=0)  # experts per token
    norm_topk_prob: bool = True  # the chosen experts' weights sum to one

    def differing_from(self, other: ModelConfig) -> list[str]:
        """Return the settings in which weights of the two models differ: all but how random weights are drawn."""
        return [
            f.name for f in fields(self) if f.name != "init_std" and getattr(self, f.name) != getattr(other, f.name)
        ]

    def __post_init__(self) -> None:
        check_numbers(self, "model")
        require(self.family in FAMILIES, f"model.family={self.family!r}: choose one of {', '.join(FAMILIES)}")
        require(
            self.num_attention_heads % self.num_query_groups == 0,
            f"model.num_query_groups={self.num_query_groups} must divide "
            f"model.num_attention_heads={self.num_attention_heads}",
        )
        require(self.kv_channels % 2 == 0, f"model.kv_channels={self.kv_channels} must be even (RoPE)")
        if self.yarn:
            reach = self.yarn.factor * self.yarn.original_max_position_embeddings
            require(
                self.max_position_embeddings <= reach,
                f"model.max_position_embeddings={self.max_position_embeddings} exceeds the reach of model.yarn: "
                f"factor x original_max_position_embeddings = {reach:g}",
            )
        self._check_head_size()
        self._check_experts()

    @property
    def qk_norm(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return FAMILIES[self.family].qk_norm

    @property
    def qkv_bias(self) -> bool:
        """Whether Q, K and V have biases."""
        return FAMILIES[self.family].qkv_bias

    def hf_config(self) -> dict[str, Any]:
        """Return the content of a Hugging Face config.json for this model."""
        return {
            "architectures": [FAMILIES[self.family].hf_architecture],
            "model_type": self.family,
            "num_hidden_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_query_groups,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_theta": float(self.rotary_base),
            "rms_norm_eps": self.layernorm_epsilon,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "torch_dtype": "float32",
            **({"rope_scaling": self.yarn.hf_rope_scaling()} if self.yarn else {}),
            **self._hf_family(),
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Return the settings of a model with this Hugging Face config.json.

        Raises ConfigError, naming the entry, for an unknown family, for a missing entry and for an unsupported feature:
        RoPE scaling other than YaRN, sliding windows, other biases, dense layers among experts, quantised weights.
        """
        name = str(config.get("model_type"))
        if name not in FAMILIES:
            raise ConfigError(f"model_type={name!r} is not known; there are {', '.join(FAMILIES)}")
        check_plain(config)
        rope, longest = rope_entries(config), count(config, "max_position_embeddings")
        # Transformers' default for a missing entry is a constant; null means one for each head
        grouped = name == "llama" or "num_key_value_heads" in config
        require(grouped, "num_key_value_heads is missing from the config.json")
        settings = {
            "family": name,
            "num_layers": count(config, "num_hidden_layers"),
            "hidden_size": count(config, "hidden_size"),
            "ffn_hidden_size": count(config, "intermediate_size"),
            "num_attention_heads": count(config, "num_attention_heads"),
            "num_query_groups": entry(config, "num_key_value_heads", config["num_attention_heads"]),
            "kv_channels": head_size(config),
            "vocab_size": count(config, "vocab_size"),
            "max_position_embeddings": longest,
            "rotary_base": rope["rope_theta"],
            "yarn": YarnConfig.from_hf(rope, longest) if rope["rope_type"] == "yarn" else None,
            "layernorm_epsilon": entry(config, "rms_norm_eps"),
            "tie_embeddings": entry(config, "tie_word_embeddings", False),
            "init_std": entry(config, "initializer_range", 0.02),
        }
        if FAMILIES[name].experts:
            settings |= {
                "num_moe_experts": experts(config),
                "moe_ffn_hidden_size": count(config, "moe_intermediate_size"),
                "moe_router_topk": count(config, "num_experts_per_tok"),
                "norm_topk_prob": entry(config, "norm_topk_prob", False),
            }
        return build(cls, settings)

    def _hf_family(self) -> dict[str, Any]:
        """Return the entries that only this family's config.json has."""
        family = FAMILIES[self.family]
        entries: dict[str, Any] = {"head_dim": self.kv_channels} if family.hf_head_dim else {}
        entries |= family.hf_entries
        if family.experts:
            entries |= {
                "num_experts": self.num_moe_experts,
                "num_experts_per_tok": self.moe_router_topk,
                "moe_intermediate_size": self.moe_ffn_hidden_size,
                "norm_topk_prob": self.norm_topk_prob,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        return entries

    def _check_head_size(self) -> None:
        family, heads, hidden = FAMILIES[self.family], self.num_attention_heads, self.hidden_size
        require(
            family.hf_head_dim or self.kv_channels * heads == hidden,
            f"model.kv_channels={self.kv_channels} x model.num_attention_heads={heads} must be "
            f"model.hidden_size={hidden}: family {self.family} has no setting for the size of a head",
        )
        require(
            not family.heads_divide_hidden or hidden % heads == 0,
            f"model.num_attention_heads={heads} must divide model.hidden_size={hidden} in family {self.family}",
        )

    def _check_experts(self) -> None:
        experts, size = self.num_moe_experts, self.moe_ffn_hidden_size
        if not FAMILIES[self.family].experts:
            for name, value in (("num_moe_experts", experts), ("moe_ffn_hidden_size", size)):
                require(value is None, f"model.{name}={value}: family {self.family} has no experts; leave it out")
            return
        require(experts is not None, f"model.num_moe_experts={experts}: {self.family} needs experts")
        require(
            size is not None,
            f"model.moe_ffn_hidden_size={size}: {self.family} needs the size of its experts",
        )
        require(
            self.moe_router_topk <= (experts or 0),
            f"model.moe_router_topk={self.moe_router_topk} must lie between 1 and model.num_moe_experts={experts}",
        )


def padded_vocab_size(model: ModelConfig, tensor_parallel: int) -> int:
    """Return the rows of the trainer's embedding: the vocabulary, padded to a multiple that all ranks share equally."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor_parallel)
    return -(-model.vocab_size // multiple) * multiple
