"""Software-engineering tasks in Docker containers: which datasets, and what a container may use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_dagger.config.base import require

Dataset = Literal["swe-bench", "swe-gym", "swe-smith", "r2e-gym"]


@dataclass(frozen=True, kw_only=True)
class SweConfig:
    """Where ``train`` is set, a run is on these tasks, and not on repair tasks.

    A dataset is a json, jsonl or parquet file of its rows, or its id on the hub. What is evaluated on never
    enters the training data, whichever dataset it comes from.
    """

    RENAMED: ClassVar = {"admission": "validation"}

    train: str = ""
    train_dataset: Dataset = "swe-gym"
    train_split: str = "train"
    validation: str = ""  # a report of `megatron-dagger validate`: train only on its valid tasks
    heldout: str = ""  # empty: ``heldout_of_train`` tasks of the training dataset
    heldout_dataset: Dataset = "swe-bench"
    heldout_split: str = "test"
    heldout_of_train: int = 0  # published for SWE-Gym: 100 of 2,438
    heldout_seed: int = 0  # which ones; not the run's seed, so that runs of several seeds compare
    whole_repositories: bool = False  # keep all of an evaluated repository out of training
    docker_url: str | None = None  # None: DOCKER_HOST, or the usual socket
    image_budget_mib: int = 200_000  # of the daemon's disk
    cpus: float = 4.0  # of a container, as the other limits
    memory_mib: int = 16_384
    disk_mib: int = 8_192
    processes: int = 512
    command_timeout_s: float = 120.0
    observation_characters: int = 12_000

    def __post_init__(self) -> None:
        require(
            not self.train or bool(self.heldout) or self.heldout_of_train > 0,
            "swe.heldout is missing: name a dataset to evaluate on, or hold tasks out by swe.heldout_of_train",
        )
