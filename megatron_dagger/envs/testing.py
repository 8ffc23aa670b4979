"""The conformance suite of environments: ours run it, and a user runs it on theirs.

    from megatron_dagger.envs.testing import check_environment
    from own_environment import guess_a_number

    def test_my_environment(tmp_path):
        check_environment(guess_a_number(), tmp_path)

It needs no engine. A check that fails raises AssertionError, which says what a run needs and what the environment does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megatron_dagger.config import RunConfig
from megatron_dagger.envs.environment import Environment, EnvironmentContext
from megatron_dagger.envs.registry import find_environment
from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from megatron_dagger.text import encodable
from megatron_dagger.types import Message, State

TASKS = 3  # that are played
ODD_COMMANDS = ("", " ", "\n", "no such command", "'", "\0", "\ud83d", "\u2028", "{" * 2000, "é" * 2000)


def check_environment(config: RunConfig, folder: Path, *, max_turns: int | None = None) -> None:
    """Check the environment of ``config``; its files go to ``folder``. Needs what it needs, such as a Docker daemon.

    ``max_turns``: how many turns the expert may take (default: ``config.rollout.limits.max_turns``).
    """
    with ExitStack() as stack:
        places = {"run_dir": folder / "run", "cache_dir": folder / "cache"}
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        context = EnvironmentContext(config=config, track=_track, stack=stack, **places)
        environment = find_environment(config.environment)(context)
        check_tasks(environment)
        tasks = environment.heldout_tasks[:TASKS]
        environment.prefetch(tasks)
        for task in tasks:
            check_odd_commands(environment, task)
            check_closing(environment, task)
        check_response(environment)
        if environment.expert is not None:
            check_expert(environment, tasks, max_turns or config.rollout.limits.max_turns)
        environment.prepare(folder / "tasks")


def check_tasks(environment: Environment) -> None:
    """Tasks are named by text, once each, and none is trained and evaluated on."""
    every = (*environment.train_tasks, *environment.heldout_tasks)
    assert all(isinstance(task, str) and task and encodable(task) == task for task in every), "a task's id is text"
    assert environment.train_tasks and environment.heldout_tasks, "there are tasks to train on and to evaluate on"
    assert len(every) == len(set(every)), "a task is named once, and not both trained and evaluated on"


def check_odd_commands(environment: Environment, task: str) -> None:
    """Whatever the agent says is answered by an observation, and judged; the same each time."""
    first, second = (play(environment, task, ODD_COMMANDS) for _ in range(2))
    assert first == second, f"{task}: the same commands are answered differently: {first} and {second}"


def play(environment: Environment, task: str, commands: Sequence[str]) -> list[object]:
    """Return all that an episode shows, and its judgement."""
    with environment.make_env(task) as env:
        assert env.task_id == task, f"the Env of {task} says that it is of {env.task_id}"
        seen: list[object] = list(env.reset())
        assert len(seen) == 2 and all(isinstance(text, str) for text in seen), f"{task}: reset returns two messages"
        for command in commands:
            observation = env.step(command)
            assert isinstance(observation.text, str), f"{task}: an observation is text, not {observation.text!r}"
            seen.append(observation)
            if observation.done:
                break
        judgement = env.judge()
        assert isinstance(judgement, bool), f"{task}: judge returns {judgement!r}"
        json.dumps(env.report())
        return [*seen, judgement]


def check_closing(environment: Environment, task: str) -> None:
    """An Env can be closed before it is reset, and twice."""
    env = environment.make_env(task)
    env.close()
    env.close()


def check_response(environment: Environment) -> None:
    """A teacher's response is read as an action, or refused; nothing else is raised."""
    for text in (
        *map(encodable, ODD_COMMANDS),
        "I look first.\nls",
        "```\nls\n```",
        '<tool_call>{"name": 1}</tool_call>',
    ):
        try:
            action = environment.read(Response(text=text))
        except MalformedResponse:
            continue
        assert isinstance(action, str), f"an action is text, not {action!r}"


def check_expert(environment: Environment, tasks: Sequence[str], max_turns: int) -> None:
    """The expert solves tasks from the start, several at a time, in what the conversation shows."""
    with ThreadPoolExecutor(environment.threads) as threads:
        outcomes = threads.map(lambda name: _by_expert(environment, name, max_turns), tasks)
        for task, solved in zip(tasks, outcomes, strict=True):
            assert solved, f"{task}: the expert does not solve it in {max_turns} turns"


@contextmanager
def _track(subject: str, total: int, **options: Any) -> Iterator[SimpleNamespace]:
    """Show no progress."""
    yield SimpleNamespace(done=0, advance=lambda *arguments, **names: None)


def _by_expert(environment: Environment, task: str, max_turns: int) -> bool:
    assert environment.expert is not None
    expert = environment.expert(lambda text: np.zeros(len(text), np.int32))
    with environment.make_env(task) as env:
        system, first = env.reset()
        messages = [Message(role="system", content=system), Message(role="user", content=first)]
        for turn in range(max_turns):
            state = State(messages=tuple(messages), tokens=np.zeros(1, np.int32), seed=turn)
            command = asyncio.run(expert.act(state)).text
            observation = env.step(command)
            messages += [Message(role="assistant", content=command), Message(role="user", content=observation.text)]
            if observation.done:
                break
        return env.judge()
