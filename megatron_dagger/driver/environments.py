"""The kinds of tasks that a run can be on, brought to what the rest of a run needs of them."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_dagger.config import ConfigError, RunConfig, SweConfig
from megatron_dagger.config.base import require
from megatron_dagger.envs.base import Env
from megatron_dagger.envs.repo_repair.corpus import texts
from megatron_dagger.envs.repo_repair.env import RepairEnv, TestMemory
from megatron_dagger.envs.repo_repair.expert import RepairExpert
from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.envs.repo_repair.task import write_tasks
from megatron_dagger.envs.repo_repair.taskset import prepare_tasks
from megatron_dagger.envs.repo_repair.testing import repair_sandbox
from megatron_dagger.policies.base import Policy
from megatron_dagger.policies.openai.cache import MalformedResponse, Reply
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.sandbox import SandboxPool, bubblewrap_works

if TYPE_CHECKING:
    from megatron_dagger.envs.swe.judge import OpenSandbox
    from megatron_dagger.envs.swe.task import SweTask
    from megatron_dagger.sandbox.docker.images import ImageStore
    from megatron_dagger.sandbox.docker.sandbox import DockerSandbox

logger = logging.getLogger(__name__)

REPAIR_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Environment:
    """``expert``: its own teacher, if it has one; ``read``: the action in a teacher's reply, in the student's format.

    ``prefetch``: make ready, in the background, what the episodes of these tasks will need. ``threads``: how many
    of its calls may block at once. ``prepare`` writes what a run keeps of the tasks, and a tokenizer made for them
    into a folder, if one is given.
    """

    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...]
    make_env: Callable[[str], Env]  # by task id
    prefetch: Callable[[Sequence[str]], None]  # by task ids
    expert: Callable[[Callable[[str], np.ndarray]], Policy] | None
    read: Callable[[Reply], str]
    threads: int
    prepare: Callable[[Path, Path | None], None]


def open_environment(
    config: RunConfig, run_dir: Path, cache_dir: Path, track: Callable[..., Any], stack: ExitStack
) -> Environment:
    """What the run's settings name; it is closed with ``stack``. Raises ConfigError, EnvironmentBroken."""
    if config.swe.train:
        return _swe(config, run_dir, stack)
    return _repair(config, cache_dir, track, stack)


def last_line(reply: Reply) -> str:
    """Reads an answer that ends with a command; a model may think aloud before."""
    lines = [line.strip() for line in reply.text.strip().splitlines()]
    if not lines or not lines[-1]:
        raise MalformedResponse("the answer is empty")
    return lines[-1]


def one_tool_call(reply: Reply) -> str:
    """Reads an answer with one call of the agent's tools, whether the endpoint took it apart or not."""
    from megatron_dagger.envs.swe.tool_calls import ToolCall, parse_tool_call
    from megatron_dagger.envs.swe.tools import TOOLS

    try:
        calls = [ToolCall(name=name, arguments=json.loads(arguments)) for name, arguments in reply.tool_calls]
        text = "\n".join([reply.text.strip(), *(call.text() for call in calls)]).strip()
        parse_tool_call(text, TOOLS)
    except ValueError as error:  # FormatError, or arguments that are not JSON
        raise MalformedResponse(str(error)) from error
    return text


def _repair(config: RunConfig, cache_dir: Path, track: Callable[..., Any], stack: ExitStack) -> Environment:
    if not bubblewrap_works():
        logger.warning("bubblewrap is missing or does not work: commands run with limits, but not isolated")
    pool = stack.enter_context(SandboxPool(repair_sandbox))
    tasks = prepare_tasks(config.repo_repair, config.seed, cache_dir, pool, track)
    by_id = {task.instance_id: task for task in (*tasks.train, *tasks.heldout)}
    memory: TestMemory = {}

    @functools.lru_cache(maxsize=256)
    def repository(task_id: str) -> dict[str, bytes]:
        return read_repository(tasks.repository(by_id[task_id]))

    def prepare(folder: Path, tokenizer: Path | None) -> None:
        write_tasks(folder / "train.jsonl", list(tasks.train))
        write_tasks(folder / "heldout.jsonl", list(tasks.heldout))
        if tokenizer is not None:
            train_tokenizer(texts(tasks.trees, tasks.train), config.model.vocab_size, tokenizer)

    return Environment(
        train_tasks=tuple(task.instance_id for task in tasks.train),
        heldout_tasks=tuple(task.instance_id for task in tasks.heldout),
        make_env=lambda task_id: RepairEnv(by_id[task_id], repository(task_id), pool, memory),
        prefetch=lambda task_ids: None,
        expert=RepairExpert,
        read=last_line,
        threads=REPAIR_THREADS,
        prepare=prepare,
    )


def _swe(config: RunConfig, run_dir: Path, stack: ExitStack) -> Environment:
    from megatron_dagger.envs.swe.env import SweEnv

    swe = config.swe
    train, heldout = swe_tasks(swe)
    by_id = {task.instance_id: task for task in (*train, *heldout)}
    images, open_sandbox = containers(swe, run_dir, stack)

    def make_env(task_id: str) -> Env:
        return SweEnv(by_id[task_id], open_sandbox, most_observation_characters=swe.observation_characters)

    def prepare(folder: Path, tokenizer: Path | None) -> None:
        assert tokenizer is None, "RunConfig asks for init_checkpoint, which has one"

    return Environment(
        train_tasks=tuple(task.instance_id for task in train),
        heldout_tasks=tuple(task.instance_id for task in heldout),
        make_env=make_env,
        prefetch=lambda task_ids: images.prefetch(by_id[task_id].image for task_id in task_ids),
        expert=None,
        read=one_tool_call,
        threads=config.rollout.concurrent_episodes,
        prepare=prepare,
    )


def containers(swe: SweConfig, owner: Path, stack: ExitStack) -> tuple[ImageStore, OpenSandbox]:
    """The images of tasks, and what opens a container for one, labelled with its ``owner``; closed with ``stack``."""
    from megatron_dagger.sandbox.docker.daemon import DockerHost
    from megatron_dagger.sandbox.docker.images import ImageStore
    from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox

    host = stack.enter_context(DockerHost(str(owner.resolve()), swe.docker_url))
    host.reap()
    stack.callback(host.remove_own)
    images = stack.enter_context(ImageStore(host, disk_budget_mib=swe.image_budget_mib))
    limits = DockerLimits(
        timeout_s=swe.command_timeout_s,
        memory_mib=swe.memory_mib,
        disk_mib=swe.disk_mib,
        processes=swe.processes,
        cpus=swe.cpus,
        output_bytes=4 * swe.observation_characters,
    )

    def open_sandbox(task: SweTask) -> DockerSandbox:
        return DockerSandbox(host, task.image, limits, root=task.workdir, images=images)

    return images, open_sandbox


def swe_tasks(swe: SweConfig) -> tuple[list[SweTask], list[SweTask]]:
    """Training and held-out tasks; what the wall between them keeps out of training is left out, and counted.

    So is what ``swe.validation`` does not list as valid.
    """
    from megatron_dagger.envs.swe.datasets import read_tasks
    from megatron_dagger.envs.swe.task import EvaluationSet, TrainingTasks, held_out
    from megatron_dagger.envs.swe.validation import valid_tasks

    train, _ = read_tasks(swe.train_dataset, swe.train, split=swe.train_split)
    if swe.heldout:
        heldout, _ = read_tasks(swe.heldout_dataset, swe.heldout, split=swe.heldout_split)
    else:
        heldout = held_out(train, swe.heldout_of_train, swe.heldout_seed)
    if swe.validation:
        fit, found = valid_tasks(Path(swe.validation)), len(train)
        train = [task for task in train if task.instance_id in fit]
        require(bool(train), f"swe.validation={swe.validation} has no valid task of swe.train={swe.train}")
        logger.info("%d of %d training tasks are valid by %s", len(train), found, swe.validation)
    never = EvaluationSet(heldout, whole_repositories=swe.whole_repositories)
    allowed, refused = TrainingTasks.allowed(train, never=never)
    if refused:
        logger.info("%d of %d training tasks are left out, such as %s", len(refused), len(train), next(iter(refused)))
    if not allowed:
        raise ConfigError(f"swe.train={swe.train}: no task is left that is not evaluated on")
    return list(allowed), heldout
