"""The tasks of a run: made once from a seed, then read from the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_dagger.config import ConfigError, RepoRepairConfig, to_dict
from megatron_dagger.envs.environment import Track
from megatron_dagger.envs.repo_repair import sources
from megatron_dagger.envs.repo_repair.generate import SourceTree, UnusablePackage, make_tasks
from megatron_dagger.envs.repo_repair.pinned_packages import find_package, packages
from megatron_dagger.envs.repo_repair.sdists import fetch_all
from megatron_dagger.envs.repo_repair.task import RepairTask, read_tasks, write_tasks
from megatron_dagger.sandbox.local import SandboxPool

logger = logging.getLogger(__name__)

SPARE = 1.1  # tasks per package, relative to its share: some packages yield too few
# Modules whose code decides which tasks are made; it is part of the cache's key.
TASK_MODULES = ("generate", "mutate", "repository", "sources", "task", "testing")


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Training and held-out tasks, from different packages, and the folder of their repositories."""

    train: tuple[RepairTask, ...]
    heldout: tuple[RepairTask, ...]
    repositories: Path
    trees: tuple[SourceTree, ...]  # of the training packages

    def repository(self, task: RepairTask) -> Path:
        """Return the folder of a task's repository."""
        return self.repositories / task.instance_id


def prepare_tasks(config: RepoRepairConfig, seed: int, cache_dir: Path, pool: SandboxPool, track: Track) -> TaskSet:
    """Return the tasks of ``config``; make those that the cache lacks. The same arguments give the same tasks.

    Raises ConfigError if a package is unknown or a side gets no task, FetchError if a package cannot be downloaded.
    """
    train_trees, heldout_trees = _trees(config, cache_dir)
    folder = cache_dir / "tasks" / _key(config, seed)
    quotas = [(tree, _quota(config.train_tasks, len(train_trees))) for tree in train_trees]
    quotas += [(tree, _quota(config.heldout_tasks, len(heldout_trees))) for tree in heldout_trees]

    def tasks_of(tree: SourceTree, quota: int) -> list[RepairTask]:
        path = folder / f"{tree.name}-{quota}.jsonl"
        if not path.exists():
            write_tasks(path, _make_tasks(tree, quota, seed, config, pool, folder / "repos"))
        return read_tasks(path)

    by_package: dict[str, list[RepairTask]] = {}
    with (
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="tasks") as workers,
        track("making repair tasks", len(quotas), unit="packages") as progress,
    ):
        for (tree, _), tasks in zip(quotas, workers.map(lambda quota: tasks_of(*quota), quotas), strict=True):
            by_package[tree.name] = tasks
            progress.advance(note=f"{sum(map(len, by_package.values()))} tasks")
    return TaskSet(
        train=_in_turn(by_package, train_trees, config.train_tasks, "train"),
        heldout=_in_turn(by_package, heldout_trees, config.heldout_tasks, "heldout"),
        repositories=folder / "repos",
        trees=tuple(train_trees),
    )


def _make_tasks(
    tree: SourceTree, quota: int, seed: int, config: RepoRepairConfig, pool: SandboxPool, repositories: Path
) -> list[RepairTask]:
    """Return a package's tasks; none, with a warning, if its own tests do not pass."""
    try:
        return make_tasks(tree, quota, seed, config, pool, repositories)
    except UnusablePackage as error:
        logger.warning("%s; the package is skipped", error)
        return []


def _trees(config: RepoRepairConfig, cache_dir: Path) -> tuple[list[SourceTree], list[SourceTree]]:
    if config.source == "stdlib":
        train = config.train_packages or sources.STDLIB_TRAIN
        heldout = config.heldout_packages or sources.STDLIB_HELDOUT
        return [sources.stdlib_tree(name) for name in train], [sources.stdlib_tree(name) for name in heldout]
    train_sources = [find_package(name) for name in config.train_packages] or list(packages(heldout=False))
    heldout_sources = [find_package(name) for name in config.heldout_packages] or list(packages(heldout=True))
    both = [*train_sources, *heldout_sources]
    trees = [sources.package_tree(source, root) for source, root in zip(both, fetch_all(both, cache_dir), strict=True)]
    return trees[: len(train_sources)], trees[len(train_sources) :]


def _quota(tasks: int, count: int) -> int:
    return -(-int(tasks * SPARE) // count)


def _in_turn(
    by_package: dict[str, list[RepairTask]], trees: Sequence[SourceTree], count: int, side: str
) -> tuple[RepairTask, ...]:
    """Return the first ``count`` tasks, taking one from each package in turn. Raises ConfigError if there are none."""
    lists = [by_package[tree.name] for tree in trees]
    turns = [tasks[turn] for turn in range(max(map(len, lists), default=0)) for tasks in lists if turn < len(tasks)]
    if not turns:
        raise ConfigError(f"no {side} task could be made from {', '.join(tree.name for tree in trees)}")
    if len(turns) < count:
        logger.warning("repo_repair.%s_tasks=%d: only %d could be made", side, count, len(turns))
    return tuple(turns[:count])


def _key(config: RepoRepairConfig, seed: int) -> str:
    """Return the cache entry's name: a digest of everything the tasks depend on, including the code that makes them."""
    here = Path(__file__).parent
    code = sorted([*(here / f"{name}.py" for name in TASK_MODULES), *(here / "tools").glob("*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    unused = {"train_packages": [], "heldout_packages": [], "train_tasks": 0, "heldout_tasks": 0}
    settings = to_dict(config) | unused
    digest.update(json.dumps([settings, seed, platform.python_version()], sort_keys=True).encode())
    return digest.hexdigest()[:16]
