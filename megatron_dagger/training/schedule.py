"""The learning rate of a step: a linear warm-up, then constant, linear or cosine decay to min_lr."""

from __future__ import annotations

import math

from megatron_dagger.config import OptimizerConfig


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """The rate of step ``step`` (from 0) of a round of ``steps``; each round starts anew.

    The warm-up reaches ``lr`` in its last step and takes no more than half of the round.
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
