"""An environment: the tasks of a run, and everything a run needs to play and label episodes of them.

Every environment provides a function ``load_environment(context)`` that returns an Environment. Three fields are
required; the defaults of the others suit an environment that needs no preparation and whose commands are one line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import RunConfig
from megatron_dagger.envs.base import Env
from megatron_dagger.policies.base import Policy
from megatron_dagger.policies.openai.cache import MalformedResponse, Response
from megatron_dagger.types import Action, Message, State

DEFAULT_THREADS = 8
_FENCES = ("```", "~~~")  # of Markdown

Track = Callable[..., AbstractContextManager[Any]]  # observability.progress.track
Encode = Callable[[str], np.ndarray]  # an action's text -> its tokens (n,), int32


def last_line(response: Response) -> str:
    """Return the last line of a response, its command; the model may reason in the lines before.

    Lines that open or close a block of code are none. Raises MalformedResponse if the response is empty.
    """
    lines = [line.strip() for line in response.text.splitlines()]
    commands = [line for line in lines if line and not line.startswith(_FENCES)]
    if not commands:
        raise MalformedResponse("the answer is empty")
    return commands[-1]


@dataclass(frozen=True, kw_only=True)
class Expert:
    """A teacher that is a program: ``command`` returns its command for the state that the messages show."""

    command: Callable[[tuple[Message, ...]], str]
    encode: Encode
    name: str = "expert"

    async def act(self, state: State) -> Action:
        text = self.command(state.messages)
        return Action(text=text, tokens=self.encode(text))


@dataclass(frozen=True, kw_only=True)
class EnvironmentContext:
    """The arguments of a load function, which enters every resource it opens (pools, connections) into ``stack``."""

    config: RunConfig
    run_dir: Path
    cache_dir: Path  # shared by all runs of a user
    track: Track  # shows progress: ``with track(subject, total, unit=...) as progress``
    stack: ExitStack


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The tasks of a run, by their ids, and the functions that play them."""

    train_tasks: tuple[str, ...]
    heldout_tasks: tuple[str, ...]
    make_env: Callable[[str], Env]
    """Return a new Env for a task id; called from several threads."""
    prefetch: Callable[[Sequence[str]], None] = lambda task_ids: None
    """Start to fetch the images and files of these tasks in the background, and return at once."""
    expert: Callable[[Encode], Policy] | None = None
    """Make the environment's own teacher; None if it has none: labels come from a model or a policy of the user's."""
    read: Callable[[Response], str] = last_line
    """Return the action in a teacher's response, in the student's format, or raise MalformedResponse."""
    threads: int = DEFAULT_THREADS
    """How many calls of its Envs may block at the same time."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Write a record of the tasks into a folder of the run; called once, when the run is created."""
    tokenizer_texts: Callable[[], Iterable[str]] | None = None
    """Return texts to train a tokenizer on, for a student that starts from random weights; None: it must not."""
