"""Repository-repair tasks: the packages that are mutated, and the number of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class RepoRepairConfig:
    """The repo_repair environment: one token of a real package is wrong, and its tests must pass again."""

    source: Literal["packages", "stdlib"] = "packages"  # stdlib: modules of the running Python, without downloads
    train_packages: tuple[str, ...] = ()  # empty: the pinned default list
    heldout_packages: tuple[str, ...] = ()  # likewise
    train_tasks: int = 192
    heldout_tasks: int = 48
    repeats: int = 3  # test runs that must agree for a task to be used, at least 2
    suspects: int = 9  # lines that the fault localiser lists
    fewest_repairs: int = 1  # minimum of repairs that a line-by-line search tries before the right one
    most_repairs: int = 11  # maximum of the same

    def __post_init__(self) -> None:
        both = set(self.train_packages) & set(self.heldout_packages)
        require(self.repeats >= 2, f"repo_repair.repeats={self.repeats}: runs cannot agree unless there are at least 2")
        require(not both, f"repo_repair: train_packages and heldout_packages share {', '.join(sorted(both))}")
