"""Repository-repair tasks: the packages that are mutated, and the number of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import check_numbers, number, require


@dataclass(frozen=True, kw_only=True)
class RepoRepairConfig:
    """The repo_repair environment: tokens of a real package are wrong, and its tests must pass again."""

    source: Literal["packages", "stdlib"] = "packages"  # stdlib: modules of the running Python, without downloads
    train_packages: tuple[str, ...] = ()  # empty: the pinned default list
    heldout_packages: tuple[str, ...] = ()  # likewise
    bugs: int = number(0, ge=0, le=9)  # K > 0: long tasks, K wrong tokens and a shell; 0: one, and tools to find it
    terse: float = number(0.0, ge=0, le=1)  # long tasks: share of operators of which only the rule they break is named
    train_tasks: int = number(192, gt=0)
    heldout_tasks: int = number(48, gt=0)
    repeats: int = number(3, ge=2)  # test runs that must agree for a task to be used, at least 2
    suspects: int = number(9, gt=0)  # lines that the fault localiser lists
    fewest_repairs: int = number(1, ge=0)  # minimum of repairs that a line-by-line search tries before the right one
    most_repairs: int = number(11, ge=0)  # maximum of the same

    def __post_init__(self) -> None:
        check_numbers(self, "repo_repair")
        both = set(self.train_packages) & set(self.heldout_packages)
        require(
            self.fewest_repairs <= self.most_repairs,
            f"repo_repair.fewest_repairs={self.fewest_repairs} must not exceed "
            f"repo_repair.most_repairs={self.most_repairs}",
        )
        require(not both, f"repo_repair: train_packages and heldout_packages share {', '.join(sorted(both))}")
