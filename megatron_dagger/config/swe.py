"""Software-engineering tasks in Docker containers: the datasets, and the limits of a container."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_dagger.config.base import check_numbers, number, require

Dataset = Literal["swe-bench", "swe-gym", "swe-smith", "r2e-gym"]


@dataclass(frozen=True, kw_only=True)
class SweConfig:
    """Tasks from SWE datasets. If ``train`` is set, a run uses these tasks instead of repair tasks.

    A dataset is a json, jsonl or parquet file of its rows, or its id on the Hugging Face hub. A task that is in the
    evaluation set never enters the training data, whichever dataset it comes from.
    """

    RENAMED: ClassVar = {"admission": "validation"}

    train: str = ""  # the training dataset; empty: repair tasks
    train_dataset: Dataset = "swe-gym"
    train_split: str = "train"
    validation: str = ""  # a report of `megatron-dagger validate`: train on its valid tasks only
    heldout: str = ""  # empty: heldout_of_train tasks of the training dataset
    heldout_dataset: Dataset = "swe-bench"
    heldout_split: str = "test"
    heldout_of_train: int = number(0, ge=0)  # the published setting for SWE-Gym: 100 of 2,438
    heldout_seed: int = 0  # selects heldout_of_train; not the run's seed, so runs with several seeds compare
    whole_repositories: bool = False  # keep every task of an evaluated repository out of training
    docker_url: str | None = None  # None: DOCKER_HOST, or the usual socket
    image_prefix: str = ""  # a registry with the same images, such as mirror.lan:5000/hub; empty: the tasks' own
    image_budget_mib: int = number(200_000, gt=0)  # of the daemon's disk
    cpus: float = number(4.0, gt=0)  # of one container, like the limits below
    memory_mib: int = number(16_384, gt=0)
    disk_mib: int = number(8_192, gt=0)
    processes: int = number(512, gt=0)
    command_timeout_s: float = number(120.0, gt=0)  # of one command of the agent
    observation_characters: int = number(12_000, gt=0)  # longer output is truncated in the middle

    def __post_init__(self) -> None:
        check_numbers(self, "swe")
        require(
            not self.train or bool(self.heldout) or self.heldout_of_train > 0,
            "swe.heldout is missing: name a dataset to evaluate on, or hold tasks out with swe.heldout_of_train=N",
        )
