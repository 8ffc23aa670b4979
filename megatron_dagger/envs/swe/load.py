"""The environment of software-engineering tasks, each in a Docker container of its own.

A run's first stage reads the data sets and keeps the tasks in the run, and containers are opened when the first episode
needs one: training needs neither Docker nor the network.
"""

from __future__ import annotations

import functools
import json
import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_dagger.config import ConfigError, SweConfig, build, to_dict
from megatron_dagger.config.base import require
from megatron_dagger.envs.base import Env
from megatron_dagger.envs.environment import Environment, EnvironmentContext
from megatron_dagger.envs.swe.containers import open_containers
from megatron_dagger.envs.swe.datasets import read_tasks
from megatron_dagger.envs.swe.env import SweEnv
from megatron_dagger.envs.swe.judge import OpenSandbox
from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.envs.swe.task import EvaluationSet, SweTask, TrainingTasks, held_out
from megatron_dagger.envs.swe.validation import valid_tasks
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.store.atomic import write_text

logger = logging.getLogger(__name__)

TASKS, TRAIN, HELDOUT = "tasks", "train.jsonl", "heldout.jsonl"  # in a run


def load_environment(context: EnvironmentContext) -> Environment:
    """Return the tasks that the run keeps, or else those that ``config.swe`` names.

    ``make_env`` and ``prefetch`` raise EnvironmentBroken if the Docker daemon cannot be reached. Raises ConfigError if
    the data sets yield no task.
    """
    swe = context.config.swe
    train, heldout = run_tasks(swe, context.run_dir)
    by_id = {task.instance_id: task.with_image_of(swe.image_prefix) for task in (*train, *heldout)}
    opening = threading.Lock()
    # Entered now, so that it closes after the threads that use the containers have ended
    daemon = context.stack.enter_context(ExitStack())

    @functools.cache
    def connected() -> tuple[ImageStore, OpenSandbox]:
        images, open_sandbox = open_containers(swe, context.run_dir, daemon)
        context.stack.callback(images.close)  # before those threads are awaited, some of which may wait for a pull
        return images, open_sandbox

    def containers() -> tuple[ImageStore, OpenSandbox]:
        with opening:
            return connected()

    def make_env(task_id: str) -> Env:
        _, open_sandbox = containers()
        return SweEnv(by_id[task_id], open_sandbox, observation_characters=swe.observation_characters)

    def prefetch(task_ids: Sequence[str]) -> None:
        images, _ = containers()
        images.prefetch(by_id[task_id].image for task_id in task_ids)

    def prepare(folder: Path) -> None:
        keep(folder / TRAIN, train)
        keep(folder / HELDOUT, heldout)

    return Environment(
        train_tasks=tuple(task.instance_id for task in train),
        heldout_tasks=tuple(task.instance_id for task in heldout),
        make_env=make_env,
        prefetch=prefetch,
        prepare=prepare,
        read=read_tool_call,
        threads=context.config.rollout.concurrent_episodes,
    )


def run_tasks(swe: SweConfig, run_dir: Path) -> tuple[list[SweTask], list[SweTask]]:
    """Return the training and the held-out tasks that a run keeps, or else those of the data sets (``load_tasks``)."""
    train, heldout = (run_dir / TASKS / name for name in (TRAIN, HELDOUT))
    return (read_kept(train), read_kept(heldout)) if train.exists() and heldout.exists() else load_tasks(swe)


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


def keep(path: Path, tasks: Iterable[SweTask]) -> None:
    """Write tasks to a jsonl file, atomically."""
    write_text(path, "".join(json.dumps(to_dict(task)) + "\n" for task in tasks))


def read_kept(path: Path) -> list[SweTask]:
    """Return the tasks that ``keep`` wrote. Raises ConfigError that names the first bad line."""
    tasks = []
    for number, line in enumerate(path.read_text().split("\n")[:-1], 1):
        try:
            tasks.append(build(SweTask, json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}:{number} is not a task ({error}); delete the file to read it anew") from error
    return tasks
