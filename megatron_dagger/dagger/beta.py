"""Beta: the probability that the teacher acts in a turn, as a function of the round.

In round 0 (SFT) the teacher acts alone. From round 1 on, a schedule falls from ``start`` to ``floor``. The
convergence proof only needs the mean of beta over the rounds to go to 0 (Ross, Gordon & Bagnell, 2011).
"""

from __future__ import annotations

import math

from megatron_dagger.config import BetaConfig, DaggerConfig


def betas(config: DaggerConfig) -> list[float]:
    """Return beta for each round, from round 0 on."""
    return [beta(config.beta, index) for index in range(config.rounds + 1)]


def beta(config: BetaConfig, round_index: int) -> float:
    """Return beta for a round, in [0, 1]."""
    if round_index == 0:
        return 1.0
    since = max(0, round_index - 1 - config.warmup_rounds)  # rounds that have decayed so far
    span = config.start - config.floor
    match config.schedule:
        case "constant":
            value = config.start
        case "linear":
            value = config.start - config.decay * since
        case "step":
            value = config.start - config.decay * (since // config.step_rounds)
        case "exponential":
            value = config.start * (1 - config.decay) ** since
        case "cosine":
            share = min(1.0, since / config.horizon_rounds)
            value = config.floor + span * 0.5 * (1 + math.cos(math.pi * share))
    return max(config.floor, value)
