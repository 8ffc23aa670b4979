"""How episodes run: the student's engine, sampling and limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a policy samples. Temperature 0 is greedy."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 64  # per turn

    def __post_init__(self) -> None:
        require(self.temperature >= 0, f"temperature must not be negative, got {self.temperature}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class VllmEngineConfig:
    """Settings of vLLM that its CPU and its CUDA build have in common."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "fp8"] = "none"  # fp8: linear layers in e4m3, a scale per 128 x 128 block
    tensor_parallel_size: int = 1
    max_model_len: int = 4096
    max_num_seqs: int = 64
    kv_cache_memory_mib: int | None = 256  # None: the memory that gpu_memory_utilization leaves
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = True  # no CUDA graphs
    threads: int = 1  # OpenMP threads, on the CPU
    start_deadline_s: float = 600.0  # for the engine to start
    request_deadline_s: float = 600.0  # for one request to it

    def __post_init__(self) -> None:
        require(
            self.quantization == "none" or self.dtype == "bfloat16",
            f"rollout.engine.quantization={self.quantization} needs rollout.engine.dtype=bfloat16, got {self.dtype} "
            "(vLLM's rule)",
        )


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits that end an episode if the agent does not end it."""

    max_turns: int = 40
    max_tokens: int = 4096  # of the whole conversation
    max_repeats: int = 6  # of the same reply in a row
    max_format_errors: int = 5  # replies in a row without a valid action
    max_seconds: float = 300.0  # of the whole episode

    def __post_init__(self) -> None:
        require(self.max_turns > 0, f"rollout.limits.max_turns must be positive, got {self.max_turns}")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How episodes are collected and evaluated."""

    sampling: SamplingConfig = SamplingConfig()
    engine: VllmEngineConfig = VllmEngineConfig()
    limits: LimitsConfig = LimitsConfig()
    concurrent_episodes: int = 32
    stage_deadline_s: float = 86_400.0  # how long processes wait for one collection or evaluation (resident mode)
