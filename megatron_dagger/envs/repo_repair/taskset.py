"""The tasks of a run: made once from a seed, then read from the cache."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    train_trees, heldout_trees = source_trees(config, cache_dir)
    folder = cache_dir / "tasks" / _key(config, seed)
    quotas = [(tree, _quota(config.train_tasks, len(train_trees))) for tree in train_trees]
    quotas += [(tree, _quota(config.heldout_tasks, len(heldout_trees))) for tree in heldout_trees]

    def tasks_of(tree: SourceTree, quota: int) -> list[RepairTask]:
        path = folder / f"{tree.name}-{quota}.jsonl"
        if not path.exists():
            write_tasks(path, _make_tasks(tree, quota, seed, config, pool, folder / "repos"))
        return read_tasks(path)

    by_package = by_tree(tasks_of, quotas, track)
    return TaskSet(
        train=in_turn(by_package, train_trees, config.train_tasks, "train"),
        heldout=in_turn(by_package, heldout_trees, config.heldout_tasks, "heldout"),
        repositories=folder / "repos",
        trees=tuple(train_trees),
    )


def by_tree(
    tasks_of: Callable[[SourceTree, int], list[RepairTask]], quotas: Sequence[tuple[SourceTree, int]], track: Track
) -> dict[str, list[RepairTask]]:
    """Return the tasks that ``tasks_of`` makes of each tree and its number, by the tree's name; two trees at a time."""
    tasks_by_name: dict[str, list[RepairTask]] = {}
    with (
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="tasks") as workers,
        track("making repair tasks", len(quotas), unit="packages") as progress,
    ):
        for (tree, _), tasks in zip(quotas, workers.map(lambda quota: tasks_of(*quota), quotas), strict=True):
            tasks_by_name[tree.name] = tasks
            progress.advance(note=f"{sum(map(len, tasks_by_name.values()))} tasks")
    return tasks_by_name


def _make_tasks(
    tree: SourceTree, quota: int, seed: int, config: RepoRepairConfig, pool: SandboxPool, repositories: Path
) -> list[RepairTask]:
    """Return a package's tasks; none, with a warning, if its own tests do not pass."""
    try:
        return make_tasks(tree, quota, seed, config, pool, repositories)
    except UnusablePackage as error:
        logger.warning("%s; the package is skipped", error)
        return []


def source_trees(config: RepoRepairConfig, cache_dir: Path) -> tuple[list[SourceTree], list[SourceTree]]:
    """Return the source trees of training and of held-out tasks; download packages that the cache lacks."""
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


def in_turn(
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
    unused = {"train_packages": [], "heldout_packages": [], "train_tasks": 0, "heldout_tasks": 0, "bugs": 0}
    return cache_key(TASK_MODULES, [to_dict(config) | unused, seed])


def cache_key(modules: Sequence[str], settings: list[Any]) -> str:
    """Return a digest of the ``modules`` of this package, of the sandbox's tools, the Python and ``settings``."""
    here = Path(__file__).parent
    code = sorted([*(here / f"{name}.py" for name in modules), *(here / "tools").glob("*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    digest.update(json.dumps([*settings, platform.python_version()], sort_keys=True).encode())
    return digest.hexdigest()[:16]
