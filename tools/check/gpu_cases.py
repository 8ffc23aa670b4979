"""The cases of tools.check.gpu: variants of the training settings, and the sizes of models and data."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_dagger.config import ModelConfig, OptimizerConfig, Packing, Precision, TrainingConfig, build


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Training settings. ``limit`` is the largest allowed mean difference of the loss, relative to the loss."""

    precision: Precision
    limit: float  # by the precision's mantissa: 24, 8 or 4 bits
    packing: Packing = "shared_prefix"
    moe: bool = False
    speed: bool = False  # also time the large model
    training: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)

    def settings(self, training: TrainingConfig, *, cuda: bool) -> TrainingConfig:
        """Return ``training`` as the variant changes it; on the CPU without FP8 and Transformer Engine's optimizer."""
        precision = self.precision if cuda or not self.precision.startswith("fp8") else "bf16"
        optimizer = replace(training.optimizer, **(self.optimizer if cuda else {}))
        changes = {k: v for k, v in self.training.items() if cuda or k == "recompute"}
        return replace(training, precision=precision, packing=self.packing, optimizer=optimizer, **changes)

    @property
    def reference(self) -> str:
        """The name of the check that trains on the same rows in fp32 on the CPU."""
        return f"reference-{self.packing}{'-moe' if self.moe else ''}"


VARIANTS = {
    "fp32": Variant(precision="fp32", limit=1e-3),
    "bf16": Variant(precision="bf16", limit=0.02, speed=True),
    "bf16_separate": Variant(precision="bf16", limit=0.02, packing="separate", speed=True),  # TE's attention
    "bf16_moments": Variant(precision="bf16", limit=0.02, optimizer={"moments": "bf16"}),
    "fp8_moments": Variant(precision="bf16", limit=0.02, optimizer={"moments": "fp8"}),
    "bf16_offload": Variant(precision="bf16", limit=0.02, optimizer={"cpu_offload_fraction": 1.0}),
    "bf16_recompute": Variant(precision="bf16", limit=0.02, training={"recompute": "full"}),
    "fp8_delayed": Variant(precision="fp8_delayed", limit=0.05),
    "fp8_tensorwise": Variant(precision="fp8_tensorwise", limit=0.05, speed=True),
    "fp8_blockwise": Variant(precision="fp8_blockwise", limit=0.05, speed=True),
    "fp8_recompute": Variant(precision="fp8_tensorwise", limit=0.05, training={"recompute": "full"}),
    "fp8_tensorwise_ends": Variant(precision="fp8_tensorwise", limit=0.05, training={"bf16_layers_at_ends": 1}),
    "fp8_tensorwise_gather": Variant(precision="fp8_tensorwise", limit=0.05, training={"fp8_param_gather": True}),
    "fp8_blockwise_gather": Variant(precision="fp8_blockwise", limit=0.05, training={"fp8_param_gather": True}),
    "moe_bf16": Variant(precision="bf16", limit=0.02, moe=True),
    "moe_fp8_blockwise": Variant(precision="fp8_blockwise", limit=0.05, moe=True),
}
REFERENCES = {
    variant.reference: replace(VARIANTS["fp32"], packing=variant.packing, moe=variant.moe)
    for variant in VARIANTS.values()
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the checks."""

    small: ModelConfig
    small_moe: ModelConfig
    large: ModelConfig
    steps: int  # of a loss curve
    small_tokens: int  # in a row of the small models
    large_tokens: int  # in a row of the large model
    timed_steps: int
    attention_tokens: int
    large_settings: dict[str, Any] = field(default_factory=dict)  # training.NAME, for the large model

    def small_training(self) -> TrainingConfig:
        return TrainingConfig(
            sequence_length=self.small_tokens,
            global_batch_tokens=8 * self.small_tokens,
            max_steps=self.steps,
            epochs=1e6,
            checkpoint_interval=10**9,
            threads_per_process=max(1, (os.cpu_count() or 1) // 4),
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=5),
        )

    def large_training(self) -> TrainingConfig:
        lengths = {"sequence_length": self.large_tokens, "global_batch_tokens": 2 * self.large_tokens}
        return build(TrainingConfig, {**lengths, **self.large_settings})


SMALL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=1024,
)
QWEN3_1_7B = ModelConfig(
    num_layers=28,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151936,
    max_position_embeddings=40960,
)
QWEN3_4B = replace(QWEN3_1_7B, num_layers=36, hidden_size=2560, ffn_hidden_size=9728, num_attention_heads=32)
MOE: dict[str, Any] = {"family": "qwen3_moe", "num_moe_experts": 8, "moe_ffn_hidden_size": 256}
SIZES = {
    "1.7b": Sizes(
        small=SMALL,
        small_moe=replace(SMALL, **MOE),
        large=QWEN3_1_7B,
        steps=40,
        small_tokens=512,
        large_tokens=8192,
        timed_steps=8,
        attention_tokens=8192,
    )
}
SIZES["4b"] = replace(  # with these settings it fits 80 GB, according to the planner
    SIZES["1.7b"], large=QWEN3_4B, large_settings={"recompute": "full", "optimizer": {"moments": "bf16"}}
)
SIZES["4b-64k"] = replace(SIZES["4b"], large_tokens=65_536, timed_steps=2, attention_tokens=65_536)
TINY = replace(SMALL, num_layers=2, hidden_size=64, ffn_hidden_size=64, num_query_groups=2, kv_channels=32)
DRY = replace(
    SIZES["1.7b"],
    small=TINY,
    small_moe=replace(TINY, **MOE, vocab_size=256),
    large=TINY,
    steps=3,
    small_tokens=128,
    large_tokens=256,
    timed_steps=2,
    attention_tokens=512,
)
