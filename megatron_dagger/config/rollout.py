"""How episodes run: the student's engine, sampling and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import check_numbers, number, require
from megatron_dagger.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a policy samples. Temperature 0 is greedy."""

    temperature: float = number(0.7, ge=0)
    top_p: float = number(0.9, gt=0, le=1)
    max_tokens: int = number(64, gt=0)  # per turn

    def __post_init__(self) -> None:
        check_numbers(self, "sampling")  # the group's last name: there are several


@dataclass(frozen=True, kw_only=True)
class VllmEngineConfig:
    """Settings of vLLM that its CPU and its CUDA build have in common."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "fp8"] = "none"  # fp8: linear layers in e4m3, a scale per 128 x 128 block
    tensor_parallel_size: int = number(1, gt=0)
    max_model_len: int = number(4096, gt=0)
    max_num_seqs: int = number(64, gt=0)
    kv_cache_memory_mib: int | None = number(256, gt=0)  # None: the memory that gpu_memory_utilization leaves
    gpu_memory_utilization: float = number(0.9, gt=0, le=1)
    enforce_eager: bool = True  # no CUDA graphs
    threads: int = number(1, gt=0)  # OpenMP threads, on the CPU
    start_deadline_s: float = number(600.0, gt=0)  # for the engine to start
    request_deadline_s: float = number(600.0, gt=0)  # for one request to it

    def __post_init__(self) -> None:
        check_numbers(self, "rollout.engine")
        require(
            self.quantization == "none" or self.dtype == "bfloat16",
            f"rollout.engine.quantization={self.quantization} needs rollout.engine.dtype=bfloat16, got {self.dtype} "
            "(vLLM's rule)",
        )

    def check_model(self, model: ModelConfig) -> None:
        """Raise ConfigError if vLLM cannot serve the model with this engine: it splits heads and MLPs evenly."""
        tp = self.tensor_parallel_size
        name = f"rollout.engine.tensor_parallel_size={tp}"
        for heads in ("num_attention_heads", "num_query_groups"):
            count = getattr(model, heads)
            copied = heads == "num_query_groups" and tp % count == 0
            require(count % tp == 0 or copied, f"{name} does not divide model.{heads}={count}")
        width = "ffn_hidden_size" if model.num_moe_experts is None else "moe_ffn_hidden_size"
        size = getattr(model, width)
        require(size % tp == 0, f"{name} does not divide model.{width}={size}")
        require(
            model.num_moe_experts is None or self.quantization == "none",
            f"rollout.engine.quantization={self.quantization} is for dense models; use none",
        )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits that end an episode if the agent does not end it."""

    max_turns: int = number(40, gt=0)
    max_tokens: int = number(4096, gt=0)  # of the whole conversation
    max_repeats: int = number(6, gt=0)  # of the same reply in a row
    max_format_errors: int = number(5, gt=0)  # replies in a row without a valid action
    max_seconds: float = number(300.0, gt=0)  # of turns; not the sandbox's start or the wait for a teacher that is down

    def __post_init__(self) -> None:
        check_numbers(self, "rollout.limits")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are collected and evaluated."""

    sampling: SamplingConfig = SamplingConfig()
    engine: VllmEngineConfig = VllmEngineConfig()
    limits: LimitsConfig = LimitsConfig()
    concurrent_episodes: int = number(32, gt=0)
    stage_deadline_s: float = number(86_400.0, gt=0)  # longest wait for one collection or evaluation (resident mode)

    def __post_init__(self) -> None:
        check_numbers(self, "rollout")
