"""The environment of software-engineering tasks, each in a Docker container of its own."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_dagger.config import ConfigError, SweConfig
from megatron_dagger.config.base import require
from megatron_dagger.envs.base import Env
from megatron_dagger.envs.environment import Environment, EnvironmentContext
from megatron_dagger.envs.swe.containers import open_containers
from megatron_dagger.envs.swe.datasets import read_tasks
from megatron_dagger.envs.swe.env import SweEnv
from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.envs.swe.task import EvaluationSet, SweTask, TrainingTasks, held_out
from megatron_dagger.envs.swe.validation import valid_tasks

logger = logging.getLogger(__name__)


def load_environment(context: EnvironmentContext) -> Environment:
    """Read the tasks that ``config.swe`` names and connect to the Docker daemon.

    Raises ConfigError if the data sets yield no task, EnvironmentBroken if the daemon cannot be reached.
    """
    swe = context.config.swe
    train, heldout = load_tasks(swe)
    by_id = {task.instance_id: task for task in (*train, *heldout)}
    images, open_sandbox = open_containers(swe, context.run_dir, context.stack)

    def make_env(task_id: str) -> Env:
        return SweEnv(by_id[task_id], open_sandbox, observation_characters=swe.observation_characters)

    return Environment(
        train_tasks=tuple(task.instance_id for task in train),
        heldout_tasks=tuple(task.instance_id for task in heldout),
        make_env=make_env,
        prefetch=lambda task_ids: images.prefetch(by_id[task_id].image for task_id in task_ids),
        read=read_tool_call,
        threads=context.config.rollout.concurrent_episodes,
    )


def load_tasks(swe: SweConfig) -> tuple[list[SweTask], list[SweTask]]:
    """Return the training and the held-out tasks.

    Training tasks that the held-out set excludes (EvaluationSet), or that ``swe.validation`` does not list as valid,
    are dropped; their number is logged. Raises ConfigError if none is left.
    """
    train, _ = read_tasks(swe.train_dataset, swe.train, split=swe.train_split)
    if swe.heldout:
        heldout, _ = read_tasks(swe.heldout_dataset, swe.heldout, split=swe.heldout_split)
    else:
        heldout = held_out(train, swe.heldout_of_train, swe.heldout_seed)
    if swe.validation:
        valid, total = valid_tasks(Path(swe.validation)), len(train)
        train = [task for task in train if task.instance_id in valid]
        require(bool(train), f"swe.validation={swe.validation} has no valid task of swe.train={swe.train}")
        logger.info("%d of %d training tasks are valid by %s", len(train), total, swe.validation)
    evaluation = EvaluationSet(heldout, whole_repositories=swe.whole_repositories)
    allowed, refused = TrainingTasks.allowed(train, never=evaluation)
    if refused:
        logger.info("%d of %d training tasks are left out, such as %s", len(refused), len(train), next(iter(refused)))
    if not allowed:
        raise ConfigError(f"swe.train={swe.train}: every task conflicts with the evaluation set; train on other tasks")
    return list(allowed), heldout
