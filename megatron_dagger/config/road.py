"""Road tasks: the length of a road, and the number of tasks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dagger.config.base import check_numbers, number


@dataclass(frozen=True, kw_only=True)
class RoadConfig:
    """The road environment, in which DAgger must beat SFT. If ``stops`` is set, a run uses it."""

    stops: int = number(0, ge=0)  # of a road; 0: other tasks
    train_tasks: int = number(300, gt=0)
    heldout_tasks: int = number(100, gt=0)

    def __post_init__(self) -> None:
        check_numbers(self, "road")
