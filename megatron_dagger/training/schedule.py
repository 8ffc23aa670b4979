"""The learning rate of a step: linear warm-up, then constant, or linear or cosine decay to ``min_lr``."""

from __future__ import annotations

import math

from megatron_dagger.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step ``step`` (from 0) in a round of ``steps`` steps.

    Every round has the whole schedule. The warm-up reaches ``lr`` in its last step and takes at most half the round.
    """
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    span = config.lr - config.min_lr
    if config.decay == "linear":
        return config.lr - span * progress
    if config.decay == "cosine":
        return config.min_lr + span * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr
