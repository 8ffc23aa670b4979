"""The tasks of a run: made once from a seed, kept in a cache, read from there ever after."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dagger.config import ConfigError, RepoRepairConfig, to_dict
from megatron_dagger.envs.repo_repair import sources
from megatron_dagger.envs.repo_repair.generate import SourceTree, UnusablePackage, make_tasks
from megatron_dagger.envs.repo_repair.packages import find, packages
from megatron_dagger.envs.repo_repair.sdists import fetch_all
from megatron_dagger.envs.repo_repair.task import RepairTask, read_tasks, write_tasks
from megatron_dagger.sandbox import SandboxPool

logger = logging.getLogger(__name__)

SPARE = 1.1  # tasks asked of each package over its share: some packages cannot give theirs
MAKING = ("generate", "mutate", "repository", "sources", "task", "testing")  # modules that decide what a task is
Track = Callable[..., Any]  # observability.progress.track


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Training and held-out tasks, of different packages, and where their repositories lie."""

    train: tuple[RepairTask, ...]
    heldout: tuple[RepairTask, ...]
    repositories: Path
    trees: tuple[SourceTree, ...]  # of the training packages

    def repository(self, task: RepairTask) -> Path:
        return self.repositories / task.instance_id


def prepare_tasks(config: RepoRepairConfig, seed: int, cache_dir: Path, pool: SandboxPool, track: Track) -> TaskSet:
    """The tasks of ``config``, made where the cache lacks them. The same arguments give the same tasks."""
    train_trees, heldout_trees = _trees(config, cache_dir)
    folder = cache_dir / "tasks" / _key(config, seed)
    quotas = [(tree, _quota(config.train_tasks, len(train_trees))) for tree in train_trees]
    quotas += [(tree, _quota(config.heldout_tasks, len(heldout_trees))) for tree in heldout_trees]

    def made(tree: SourceTree, quota: int) -> list[RepairTask]:
        path = folder / f"{tree.name}-{quota}.jsonl"
        if not path.exists():
            write_tasks(path, _made_or_none(tree, quota, seed, config, pool, folder / "repos"))
        return read_tasks(path)

    by_package: dict[str, list[RepairTask]] = {}
    with (
        ThreadPoolExecutor(max_workers=2, thread_name_prefix="tasks") as workers,
        track("making repair tasks", len(quotas), unit="packages") as progress,
    ):
        for (tree, _), tasks in zip(quotas, workers.map(lambda q: made(*q), quotas), strict=True):
            by_package[tree.name] = tasks
            progress.advance(note=f"{sum(map(len, by_package.values()))} tasks")
    return TaskSet(
        train=_in_turn(by_package, train_trees, config.train_tasks, "train"),
        heldout=_in_turn(by_package, heldout_trees, config.heldout_tasks, "heldout"),
        repositories=folder / "repos",
        trees=tuple(train_trees),
    )


def _made_or_none(
    tree: SourceTree, quota: int, seed: int, config: RepoRepairConfig, pool: SandboxPool, repositories: Path
) -> list[RepairTask]:
    try:
        return make_tasks(tree, quota, seed, config, pool, repositories)
    except UnusablePackage as error:
        logger.warning("%s; it is left out", error)
        return []


def _trees(config: RepoRepairConfig, cache_dir: Path) -> tuple[list[SourceTree], list[SourceTree]]:
    if config.source == "stdlib":
        train = config.train_packages or sources.STDLIB_TRAIN
        heldout = config.heldout_packages or sources.STDLIB_HELDOUT
        return [sources.stdlib_tree(name) for name in train], [sources.stdlib_tree(name) for name in heldout]
    train_sources = [find(name) for name in config.train_packages] or list(packages(heldout=False))
    heldout_sources = [find(name) for name in config.heldout_packages] or list(packages(heldout=True))
    both = [*train_sources, *heldout_sources]
    trees = [sources.package_tree(source, root) for source, root in zip(both, fetch_all(both, cache_dir), strict=True)]
    return trees[: len(train_sources)], trees[len(train_sources) :]


def _quota(tasks: int, count: int) -> int:
    return -(-int(tasks * SPARE) // count)


def _in_turn(
    by_package: dict[str, list[RepairTask]], trees: Sequence[SourceTree], count: int, side: str
) -> tuple[RepairTask, ...]:
    """The first ``count`` tasks, one of each package in turn."""
    lists = [by_package[tree.name] for tree in trees]
    turns = [tasks[turn] for turn in range(max(map(len, lists), default=0)) for tasks in lists if turn < len(tasks)]
    if not turns:
        raise ConfigError(f"no {side} task could be made from {', '.join(tree.name for tree in trees)}")
    if len(turns) < count:
        logger.warning("tasks.%s_tasks=%d: only %d could be made", side, count, len(turns))
    return tuple(turns[:count])


def _key(config: RepoRepairConfig, seed: int) -> str:
    """Names the cache entry: by what the tasks depend on, the code that makes them included."""
    here = Path(__file__).parent
    code = sorted([*(here / f"{name}.py" for name in MAKING), *(here / "tools").glob("*.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in code))
    settings = to_dict(replace(config, train_packages=(), heldout_packages=(), train_tasks=0, heldout_tasks=0))
    digest.update(json.dumps([settings, seed, platform.python_version()], sort_keys=True).encode())
    return digest.hexdigest()[:16]
