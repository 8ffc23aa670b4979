"""The settings of the algorithm: who acts, and which episodes are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import check_numbers, number, require


@dataclass(frozen=True, kw_only=True)
class BetaConfig:
    """The probability beta that the teacher acts in a turn, by round (always 1 in round 0)."""

    schedule: Literal["linear", "cosine", "exponential", "step", "constant"] = "linear"
    start: float = number(1.0, ge=0, le=1)  # in round 1
    floor: float = number(0.0, ge=0, le=1)
    decay: float = number(0.2, ge=0, le=1)  # linear: per round; exponential: factor 1 - decay; step: per step_rounds
    step_rounds: int = number(1, gt=0)  # step: rounds between two steps
    horizon_rounds: int = number(5, gt=0)  # cosine: rounds from start to floor
    warmup_rounds: int = number(0, ge=0)  # rounds after round 0 that keep ``start``

    def __post_init__(self) -> None:
        check_numbers(self, "dagger.beta")
        require(
            self.floor <= self.start, f"dagger.beta.floor={self.floor} must not exceed dagger.beta.start={self.start}"
        )


@dataclass(frozen=True, kw_only=True)
class AggregationConfig:
    """Which committed episodes a round trains on."""

    window: Literal["all", "last", "current"] = "all"
    last_rounds: int = number(3, gt=0)  # for window=last
    filter: Literal["none", "finished", "solved"] = "none"
    deduplicate: bool = True  # count the same label after the same tokens once, however often the state was visited
    max_labels_per_round: int | None = number(None, gt=0)  # drawn at random from each round's labels; None: all
    max_sft_labels: int | None = number(None, gt=0)  # as many of round 0 instead; None: max_labels_per_round
    disagreement_weight: float = number(1.0, gt=0)  # of a label in the loss, where the student did something else

    def __post_init__(self) -> None:
        check_numbers(self, "dagger.aggregation")

    def max_labels(self, round_index: int) -> int | None:
        """Return how many labels of a round are kept at most; None: all."""
        first = round_index == 0 and self.max_sft_labels is not None
        return self.max_sft_labels if first else self.max_labels_per_round


@dataclass(frozen=True, kw_only=True)
class DaggerConfig:
    """Rounds of collect, label, aggregate, train, sync, evaluate. Round 0 is SFT on the teacher's episodes."""

    rounds: int = number(3, ge=0)  # after round 0
    tasks_per_round: int = number(64, gt=0)
    sft_tasks: int = number(64, gt=0)  # of round 0
    mixing: Literal["per_turn", "prefix"] = "per_turn"
    beta: BetaConfig = BetaConfig()
    prefix_turns_per_round: int = number(20, ge=0)  # prefix: the student's first turns, 0 to min(this x round, limit)
    prefix_turns_limit: int = number(100, ge=0)
    takeover_turns: int = number(0, ge=0)  # that the teacher acts after a turn in which the student erred
    aggregation: AggregationConfig = AggregationConfig()
    evaluation_tasks: int = number(48, ge=0)  # held-out tasks, the same in every round
    evaluation_train_tasks: int = number(0, ge=0)  # training tasks that are evaluated too
    evaluate_rounds: Literal["all", "last"] = "all"
    diagnose: bool | None = None  # the teacher labels evaluations and takes over; None: if it is no language model

    def __post_init__(self) -> None:
        check_numbers(self, "dagger")

    def evaluates(self, round_index: int) -> bool:
        """Return whether a round is evaluated."""
        return self.evaluate_rounds == "all" or round_index >= self.rounds
