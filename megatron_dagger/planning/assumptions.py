"""The numbers that the planner cannot derive. Each has a name, is printed with the plan and can be changed."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_dagger.config.base import require

_SHARES = (
    "mfu",
    "mfu_fp8",
    "experts_share",
    "prefill_mfu",
    "bandwidth_share",
    "turns_share",
    "tokens_share",
    "reply_share",
)


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Shares lie in (0, 1], times are in seconds, memory is in GiB. None of these numbers was measured on a GPU."""

    # memory
    reserve_gib: float = 4.0  # per GPU: CUDA context, NCCL and cuBLAS buffers, what the weight loader holds briefly
    fragmentation: float = 0.08  # of the activations: memory that the caching allocator cannot use
    expert_load: float = 1.5  # tokens of the busiest expert-parallel rank over the mean (1: balanced); unused with EP 1
    label_share: float = 0.5  # of a packed row's tokens, at most: logits are computed for label tokens only
    serving_gib: float = 3.0  # per GPU of an engine: its activations and CUDA graphs
    # shares of the GPU's peak
    mfu: float = 0.4  # training's matrix products in BF16 and fp32 and its attention, communication included
    mfu_fp8: float = 0.25  # matrix products in FP8, of FP8's peak
    # factor on these two for experts: their products are small and many, and tokens are exchanged
    experts_share: float = 0.6
    prefill_mfu: float = 0.4  # of prompts
    bandwidth_share: float = 0.7  # of the memory's bandwidth, in decoding
    decode_step_s: float = 0.008  # added to every decoding step: launches, all-reduces, sampling
    # episodes
    turns_share: float = 0.5  # an episode's turns, of limits.max_turns
    tokens_share: float = 0.5  # its tokens at the end, of limits.max_tokens
    reply_share: float = 0.25  # of these tokens, the share that policies wrote; the rest is read
    # share of the student's turns whose label is the executed action: such a label adds no tokens
    agreement: float = 0.3
    tool_s: float = 2.0  # per turn, outside the engine: the command in the sandbox
    other_s: float = 180.0  # per stage: start-up, loading, checkpoints

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(value >= 0, f"assumption {field.name} must not be negative, got {value}")
        require(self.expert_load >= 1, f"assumption expert_load must be at least 1, got {self.expert_load}")
        for name in _SHARES:
            value = getattr(self, name)
            require(0 < value <= 1, f"assumption {name} is a share and must lie in (0, 1], got {value}")
        for name in ("agreement", "label_share", "fragmentation"):
            value = getattr(self, name)
            require(value <= 1, f"assumption {name} is a share and must not exceed 1, got {value}")
