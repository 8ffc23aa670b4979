"""Teachers behind a test's own endpoints, and states to ask them about."""

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from megatron_dagger.config import SamplingConfig, TeacherConfig
from megatron_dagger.envs.environment import last_line
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.types import Action, Message, State
from tools.support.chat_server import ChatServer


def encode(text: str) -> np.ndarray:
    return np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)


def state(*texts: str, seed: int = 1) -> State:
    """Return the state after the user and assistant messages ``texts``."""
    roles = ["system", "user", *["assistant", "user"] * len(texts)]
    messages = tuple(Message(role=r, content=t) for r, t in zip(roles, ("be an agent", *texts), strict=False))
    return State(messages=messages, tokens=np.zeros(1, np.int32), seed=seed)


@contextmanager
def teacher(folder: Path, *servers: ChatServer, **settings) -> Iterator[EndpointPolicy]:
    """Yield a teacher on ``servers`` whose responses are cached in ``folder``."""
    defaults = {"request_timeout_s": 5.0, "patience_s": 5.0, "sampling": SamplingConfig(max_tokens=50)}
    config = TeacherConfig(urls=tuple(s.url for s in servers), model="teacher-30b", **{**defaults, **settings})
    with closing(ResponseCache(folder)) as cache, EndpointPool(config, cache) as pool:
        yield EndpointPolicy(config, pool, cache, read=last_line, encode=encode)


def act(policy: EndpointPolicy, *states: State) -> list[Action]:
    """Ask for the actions in all states at once."""

    async def act_in_all():
        return await asyncio.gather(*map(policy.act, states))

    return asyncio.run(act_in_all())
