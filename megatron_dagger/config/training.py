"""How a round is trained: parallel layout, precision, optimizer, batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import check_numbers, number, require
from megatron_dagger.config.model import ModelConfig

Packing = Literal["shared_prefix", "separate"]
Precision = Literal["fp32", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]

LABEL_MULTIPLE = 8  # the number of a row's label tokens is rounded up to a multiple of this, for faster GEMMs


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Megatron-Core's parallel layout. The data-parallel size is world_size / (TP x PP x CP)."""

    world_size: int = number(1, gt=0)  # ranks in total
    nodes: int = number(1, gt=0)  # hosts that the ranks run on
    tensor_model_parallel_size: int = number(1, gt=0)
    pipeline_model_parallel_size: int = number(1, gt=0)
    virtual_pipeline_model_parallel_size: int | None = number(None, gt=0)
    context_parallel_size: int = number(1, gt=0)
    sequence_parallel: bool = False
    expert_model_parallel_size: int = number(1, gt=0)  # tensor- and data-parallel ranks that share a layer's experts
    expert_tensor_parallel_size: int = number(1, gt=0)  # ranks that share one expert

    def __post_init__(self) -> None:
        check_numbers(self, "training.parallel")
        require(
            self.world_size % self.nodes == 0,
            f"training.parallel.nodes={self.nodes} does not divide training.parallel.world_size={self.world_size}",
        )
        require(
            self.world_size % self.model_parallel_size == 0,
            f"training.parallel.world_size={self.world_size} is not a multiple of TP x PP x CP = "
            f"{self.model_parallel_size}",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "training.parallel.sequence_parallel needs tensor_model_parallel_size > 1",
        )
        stage = self.world_size // self.pipeline_model_parallel_size
        require(
            stage % (self.expert_model_parallel_size * self.expert_tensor_parallel_size) == 0,
            f"training.parallel.expert_model_parallel_size={self.expert_model_parallel_size} x "
            f"expert_tensor_parallel_size={self.expert_tensor_parallel_size} does not divide the {stage} ranks of "
            "a pipeline stage",
        )

    @property
    def model_parallel_size(self) -> int:
        """The number of ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks on each host."""
        return self.world_size // self.nodes

    @property
    def data_parallel_size(self) -> int:
        """The number of copies of the model."""
        return self.world_size // self.model_parallel_size

    @property
    def expert_data_parallel_size(self) -> int:
        """The number of ranks in a pipeline stage that hold the same experts."""
        stage = self.world_size // self.pipeline_model_parallel_size
        return stage // (self.expert_model_parallel_size * self.expert_tensor_parallel_size)

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if this layout does not fit the model."""
        for name in ("num_attention_heads", "num_query_groups"):
            self._check_divides("tensor_model_parallel_size", model, name)
        if model.num_moe_experts is None:
            self._check_divides("tensor_model_parallel_size", model, "ffn_hidden_size")
            for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
                size = getattr(self, name)
                require(
                    size == 1, f"training.parallel.{name}={size}: family {model.family} has no experts; set it to 1"
                )
        else:
            self._check_divides("expert_model_parallel_size", model, "num_moe_experts")
            self._check_divides("expert_tensor_parallel_size", model, "moe_ffn_hidden_size")
        stages = self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)
        require(
            model.num_layers % stages == 0,
            f"model.num_layers={model.num_layers} cannot be split evenly over {stages} pipeline stages",
        )

    def _check_divides(self, setting: str, model: ModelConfig, name: str) -> None:
        size, value = getattr(self, setting), getattr(model, name)
        require(
            value % size == 0,
            f"training.parallel.{setting}={size} does not divide model.{name}={value}; "
            f"choose one of {[d for d in range(1, min(value, 4096) + 1) if value % d == 0][:8]}",
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and decay. The schedule restarts each round."""

    lr: float = number(2e-3, gt=0)
    min_lr: float = number(0.0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = number(10, ge=0)
    weight_decay: float = number(0.01, ge=0)
    adam_beta1: float = number(0.9, ge=0, lt=1)
    adam_beta2: float = number(0.95, ge=0, lt=1)
    adam_eps: float = number(1e-8, gt=0)
    clip_grad: float = number(1.0, ge=0)
    distributed: bool = True  # Megatron's distributed optimizer
    reset_each_round: bool = False  # discard the moments when a new round begins
    moments: Literal["fp32", "bf16", "fp8"] = "fp32"  # their precision; bf16 and fp8 need Transformer Engine's AdamW
    cpu_offload_fraction: float = number(0.0, ge=0, le=1)  # share of the state kept and updated in host memory

    def __post_init__(self) -> None:
        check_numbers(self, "training.optimizer")
        require(
            self.min_lr <= self.lr,
            f"training.optimizer.min_lr={self.min_lr} must not exceed training.optimizer.lr={self.lr}",
        )

    @property
    def precision_aware(self) -> bool:
        """Whether Megatron's precision-aware optimizer is needed, which also does the offloading."""
        return self.moments != "fp32" or self.cpu_offload_fraction > 0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One round of training on the aggregated data."""

    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Precision = "fp32"
    fp8_param_gather: bool = False  # keep weights in FP8 between steps and gather them in FP8
    bf16_layers_at_ends: int = number(0, ge=0)  # first and last layers, this many each, that stay in BF16 with FP8
    epochs: float = number(3.0, gt=0)  # passes over the round's aggregated data, limited by max_steps
    max_steps: int | None = number(None, gt=0)  # limit of optimizer steps per round
    max_sft_steps: int | None = number(None, gt=0)  # limit of round 0 instead; None: max_steps
    sequence_length: int = number(4096, gt=0)  # maximum tokens of a packed row (a micro-batch)
    packing: Packing = "separate"  # shared_prefix: compute an episode's prefix once for all its labels; same steps
    global_batch_tokens: int = number(16384, gt=0)  # of a step without copied prefixes, a multiple of sequence_length
    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[RecomputeModule, ...] = ("core_attn",)  # for recompute=selective
    checkpoint_interval: int = number(50, gt=0)  # steps between checkpoints within a round
    threads_per_process: int = number(1, gt=0)  # OpenMP threads, on the CPU
    deadline_s: float = number(7200.0, gt=0)  # a round that takes longer fails
    collective_timeout_s: float = number(1800.0, gt=0)  # ranks that wait longer for another one fail

    def __post_init__(self) -> None:
        check_numbers(self, "training")
        require(
            self.global_batch_tokens % (self.sequence_length * self.parallel.data_parallel_size) == 0,
            f"training.global_batch_tokens={self.global_batch_tokens} must be a multiple of "
            f"sequence_length x data-parallel size = "
            f"{self.sequence_length} x {self.parallel.data_parallel_size}",
        )

    def steps_limit(self, round_index: int) -> int | None:
        """Return the limit of a round's optimizer steps; None: only ``epochs`` counts."""
        return self.max_sft_steps if round_index == 0 and self.max_sft_steps is not None else self.max_steps

    @property
    def row_multiple(self) -> int:
        """The tokens that a row's length must be a multiple of.

        Each rank's share must suit FP8 (GEMMs: 16, blocks: 128); below fp32, block masks need a multiple of 128.
        """
        masked = self.packing == "shared_prefix" and self.precision != "fp32"
        share = (128 if self.precision == "fp8_blockwise" else 16) * self.parallel.tensor_model_parallel_size
        return math.lcm(share, 128) if masked else share

    @property
    def micro_batches(self) -> int:
        """The micro-batches, of one packed row each, per optimizer step and data-parallel rank."""
        return self.global_batch_tokens // self.sequence_length // self.parallel.data_parallel_size
