"""The environment of repair tasks: bugs planted in real packages, repaired in a local sandbox.

``repo_repair.bugs`` chooses the kind: one bug that is searched for with tools, or several that are repaired in a shell.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from megatron_dagger.envs.base import Env
from megatron_dagger.envs.environment import Environment, EnvironmentContext, Expert
from megatron_dagger.envs.repo_repair.compiled import compile_modules
from megatron_dagger.envs.repo_repair.corpus import texts
from megatron_dagger.envs.repo_repair.env import RepairEnv, TestMemory
from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.envs.repo_repair.long.corpus import long_texts
from megatron_dagger.envs.repo_repair.long.env import LongRepairEnv
from megatron_dagger.envs.repo_repair.long.expert import next_command as next_long_command
from megatron_dagger.envs.repo_repair.long.tasks import prepare_long_tasks, repairs
from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.envs.repo_repair.task import write_tasks
from megatron_dagger.envs.repo_repair.taskset import prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.sandbox.local import SandboxPool, bubblewrap_works

logger = logging.getLogger(__name__)

CACHED_REPOSITORIES = 256


def load_environment(context: EnvironmentContext) -> Environment:
    """Make the tasks that ``config.repo_repair`` names, or read them from the cache.

    Raises ConfigError if a package is unknown or yields no task, EnvironmentBroken if the sandbox does not work.
    """
    if not bubblewrap_works():
        logger.warning("bubblewrap is missing or does not work: commands run with limits, but not isolated")
    config = context.config
    compiled = context.cache_dir / "compiled"
    compiled.mkdir(parents=True, exist_ok=True)
    pool = context.stack.enter_context(SandboxPool(functools.partial(repair_sandbox, compiled)))
    long = config.repo_repair.bugs > 0
    make_tasks = prepare_long_tasks if long else prepare_tasks
    tasks = make_tasks(config.repo_repair, config.seed, context.cache_dir, pool, context.track)
    by_id = {task.instance_id: task for task in (*tasks.train, *tasks.heldout)}
    memory: TestMemory = {}

    @functools.lru_cache(maxsize=CACHED_REPOSITORIES)
    def repository(task_id: str) -> dict[str, bytes]:
        files = read_repository(tasks.repository(by_id[task_id]))
        for modules in (files, *(repairs(files) if long else ())):
            compile_modules(modules, compiled)
        return files

    def prepare(folder: Path) -> None:
        write_tasks(folder / "train.jsonl", list(tasks.train))
        write_tasks(folder / "heldout.jsonl", list(tasks.heldout))

    def make_env(task_id: str) -> Env:
        task, files = by_id[task_id], repository(task_id)
        return LongRepairEnv(task, files, pool) if long else RepairEnv(task, files, pool, memory)

    return Environment(
        train_tasks=tuple(task.instance_id for task in tasks.train),
        heldout_tasks=tuple(task.instance_id for task in tasks.heldout),
        make_env=make_env,
        expert=lambda encode: Expert(command=next_long_command if long else next_command, encode=encode),
        prepare=prepare,
        tokenizer_texts=lambda: long_texts(tasks) if long else texts(tasks.trees, tasks.train),
    )
