"""Checks of what a run is made of: the student's checkpoint, the tasks, a sandbox, the teacher."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_dagger.config import ConfigError
from megatron_dagger.driver.checks import check_init_checkpoint, check_packages
from megatron_dagger.driver.context import teacher_config
from megatron_dagger.driver.doctor.examination import Examination, Finding, ok, problem, skipped, warning
from megatron_dagger.driver.environments import open_environment
from megatron_dagger.envs.environment import last_line
from megatron_dagger.envs.swe.responses import read_tool_call
from megatron_dagger.observability.progress import track
from megatron_dagger.policies.openai.cache import Response
from megatron_dagger.policies.registry import find_teacher
from megatron_dagger.types import Message, State
from megatron_dagger.weights.checkpoints import HF_FILES

TEACHER_PATIENCE_S = 20.0
ANSWER_TIMEOUT_S = 50.0
SHOWN = 60  # characters of an answer


def model(examination: Examination) -> Finding:
    """Check the checkpoint that the student starts from, and its tokenizer."""
    from megatron_dagger.rollout.chat import ChatRenderer

    config = examination.config
    if config.init_checkpoint is None:
        return ok("random weights, and a tokenizer trained on the tasks")
    try:
        check_init_checkpoint(config)
    except ConfigError as error:
        return problem(str(error), "the recipe's description has the command: `megatron-dagger recipes NAME`")
    try:
        ChatRenderer.load(Path(config.init_checkpoint) / HF_FILES).check_vocabulary(config.model.vocab_size)
    except ConfigError as error:
        return problem(str(error), "convert a checkpoint whose tokenizer and weights belong together")
    return ok(f"{config.init_checkpoint}, with its tokenizer")


def tasks(examination: Examination) -> Finding:
    """Check that the tasks can be read; those that a run makes itself are not made here."""
    config = examination.config
    if config.environment == "repair":
        check_packages(config.repo_repair)
        count = len(config.repo_repair.train_packages) + len(config.repo_repair.heldout_packages)
        return ok(f"{count or 'the default'} packages; the run's first stage makes the tasks")
    try:
        environment = open_environment(config, examination.run_dir, examination.cache_dir, track, examination.stack)
    except ConfigError as error:
        return problem(str(error), "without internet: download the data set beforehand, or name a file of its rows")
    examination.environment = environment
    return ok(f"{len(environment.train_tasks)} to train on, {len(environment.heldout_tasks)} held out")


def sandbox(examination: Examination) -> Finding:
    """Start a task's sandbox, with its image, and read the task in it."""
    config = examination.config
    if config.environment != "repair":
        if examination.environment is None:
            return skipped("needs the tasks")
        task = examination.environment.train_tasks[0]
        with closing(examination.environment.make_env(task)) as env:
            examination.prompt = env.reset()
        return ok(f"{task} starts and shows its task")
    from megatron_dagger.envs.repo_repair.testing import repair_sandbox
    from megatron_dagger.sandbox.local import bubblewrap_works

    with closing(repair_sandbox()) as local:
        local.write({"file": b""})
    if not bubblewrap_works():
        return warning(
            "commands run as plain processes: bubblewrap is missing, or user namespaces are forbidden",
            "install bubblewrap, or run as root: what the student does is not isolated otherwise",
        )
    return ok("bubblewrap")


def teacher(examination: Examination) -> Finding:
    """Ask the teacher one question as a run does: a task's first state, for an action in the student's format."""
    source = examination.config.teacher.source
    if source == "expert":
        return ok("the environment's own expert")
    if source != "endpoint":
        find_teacher(source)
        return ok(f"{source} can be imported")
    from megatron_dagger.policies.base import PolicyError
    from megatron_dagger.policies.openai.cache import ResponseCache
    from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
    from megatron_dagger.policies.openai.policy import EndpointPolicy

    config = replace(
        teacher_config(examination.config), patience_s=TEACHER_PATIENCE_S, request_timeout_s=ANSWER_TIMEOUT_S
    )
    system, task = examination.prompt or _prompt(examination)
    messages = (Message(role="system", content=system), Message(role="user", content=task))
    read = examination.environment.read if examination.environment else _read(examination)
    began = time.monotonic()
    with (
        closing(ResponseCache(examination.work_dir / "teacher")) as cache,
        EndpointPool(config, cache) as pool,
    ):
        policy = EndpointPolicy(config, pool, cache, read=read, encode=lambda text: np.zeros(0, np.int32))
        try:
            action = asyncio.run(policy.act(State(messages=messages, tokens=np.zeros(0, np.int32), seed=1)))
        except PolicyError as error:
            if "no teacher answered" in str(error):  # a run waits for it
                patience_s = examination.config.teacher.patience_s
                return warning(str(error), f"start it: the run waits {patience_s:.0f} s for it (teacher.patience_s)")
            return problem(str(error), f"see {config.urls[0]}/models: the address, teacher.model, the key")
        used = f"{cache.prompt_tokens} tokens read, {cache.completion_tokens} written"
    answer = " ".join(action.text.split())
    shown = answer if len(answer) <= SHOWN else f"...{answer[-SHOWN:]}"
    return ok(f"{config.model} in {time.monotonic() - began:.1f} s ({used}): {shown}")


def _prompt(examination: Examination) -> tuple[str, str]:
    """Return the messages of a made-up task, where no sandbox could show a real one."""
    from megatron_dagger.envs.swe.env import SYSTEM_MESSAGE

    task = "The tests of this repository fail. Look around first."
    return (SYSTEM_MESSAGE if examination.config.environment == "swe" else "Reply with one shell command.", task)


def _read(examination: Examination) -> Callable[[Response], str]:
    """Return how the teacher's response is read, where the environment could not be opened."""
    return read_tool_call if examination.config.environment == "swe" else last_line
