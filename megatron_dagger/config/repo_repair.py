"""Repository-repair tasks: which packages are mutated, and how many tasks are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dagger.config.base import require


@dataclass(frozen=True, kw_only=True)
class RepoRepairConfig:
    """Settings of the repo_repair environment: one token of a real package is wrong, its tests must pass again."""

    source: Literal["packages", "stdlib"] = "packages"  # stdlib: modules of the running Python, nothing is downloaded
    train_packages: tuple[str, ...] = ()  # empty: the pinned default list
    heldout_packages: tuple[str, ...] = ()
    train_tasks: int = 192
    heldout_tasks: int = 48
    repeats: int = 3  # agreeing test runs that a task needs, at least 2
    suspects: int = 9  # lines that the fault localiser shows
    fewest_repairs: int = 1  # repairs that a line-by-line search tries before the right one, at least
    most_repairs: int = 11  # and at most

    def __post_init__(self) -> None:
        both = set(self.train_packages) & set(self.heldout_packages)
        require(self.repeats >= 2, f"repo_repair.repeats={self.repeats}: runs cannot agree unless there are at least 2")
        require(not both, f"repo_repair: in train_packages and in heldout_packages: {', '.join(sorted(both))}")
