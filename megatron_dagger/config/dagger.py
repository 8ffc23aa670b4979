"""The settings of the algorithm: who acts, and which episodes are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class BetaConfig:
    """The probability beta that the teacher acts in a turn, by round (always 1 in round 0)."""

    schedule: Literal["linear", "cosine", "exponential", "step", "constant"] = "linear"
    start: float = 1.0  # in round 1
    floor: float = 0.0
    decay: float = 0.2  # linear: per round; exponential: factor 1 - decay; step: per step_rounds
    step_rounds: int = 1  # step: rounds between two steps
    horizon_rounds: int = 5  # cosine: rounds from start to floor
    warmup_rounds: int = 0  # rounds after round 0 that keep ``start``

    def __post_init__(self) -> None:
        for name in ("start", "floor", "decay"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"dagger.beta.{name} must lie in [0, 1], got {value}")
        require(
            self.floor <= self.start, f"dagger.beta.floor={self.floor} must not exceed dagger.beta.start={self.start}"
        )
        for name in ("step_rounds", "horizon_rounds"):
            value = getattr(self, name)
            require(value > 0, f"dagger.beta.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """Which committed episodes a round trains on."""

    window: Literal["all", "last", "current"] = "all"
    last_rounds: int = 3  # for window=last
    filter: Literal["none", "finished", "solved"] = "none"
    deduplicate: bool = True  # count the same label after the same tokens once
    max_labels_per_round: int | None = None  # drawn at random from each round's labels; None: all

    def __post_init__(self) -> None:
        require(self.last_rounds > 0, f"dagger.aggregation.last_rounds must be positive, got {self.last_rounds}")


@dataclass(frozen=True, kw_only=True)
class DaggerConfig:
    """Rounds of collect, label, aggregate, train, sync, evaluate. Round 0 is SFT on the teacher's episodes."""

    rounds: int = 3  # after round 0
    tasks_per_round: int = 64
    sft_tasks: int = 64  # of round 0
    mixing: Literal["per_turn", "prefix"] = "per_turn"
    beta: BetaConfig = BetaConfig()
    prefix_turns_per_round: int = 20  # prefix: the student acts in the first 0 to min(this x round, limit) turns
    prefix_turns_limit: int = 100
    aggregation: AggregationConfig = AggregationConfig()
    evaluation_tasks: int = 48  # held-out tasks, the same in every round
    evaluation_train_tasks: int = 0  # training tasks that are evaluated too
    evaluate_rounds: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        require(self.rounds >= 0, f"dagger.rounds must not be negative, got {self.rounds}")
        for name in ("tasks_per_round", "sft_tasks"):
            value = getattr(self, name)
            require(value > 0, f"dagger.{name} must be positive, got {value}")

    def evaluates(self, round_index: int) -> bool:
        """Return whether a round is evaluated."""
        return self.evaluate_rounds == "all" or round_index >= self.rounds
