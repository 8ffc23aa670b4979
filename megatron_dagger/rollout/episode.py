"""One episode: an actor and an environment take turns until the task ends or a limit does.

Whatever breaks is a typed stop reason, never an observation: the caller decides what becomes data.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Executor as ThreadPool
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from megatron_dagger.config import LimitsConfig
from megatron_dagger.envs.base import Env, EnvironmentBroken, Observation
from megatron_dagger.policies.base import PolicyError, PolicyGone
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.types import ActedBy, Action, Message, State, StopReason, Trajectory, Turn

FORMAT_ERROR = "error: reply with one shell command"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnDecision:
    """What is executed in a state and by whom, and the teacher's label where it was asked for."""

    acted_by: ActedBy
    action: Action
    label: Action | None


class TurnPolicy(Protocol):
    """Who acts in an episode, turn by turn: one policy, or a mixture of two."""

    async def decide(self, state: State, turn: int) -> TurnDecision: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeKey:
    """Names an episode within a run, and seeds every draw in it.

    Under the same name all can be drawn anew: ``draw`` is which draw it is.
    """

    run_seed: int
    round_index: int
    task_id: str
    attempt: int = 0
    draw: int = 0

    def seed(self, turn: int, purpose: str = "sample") -> int:
        """A 63-bit seed that depends on nothing but this key, the turn and the purpose."""
        text = f"{self.run_seed}:{self.round_index}:{self.task_id}:{self.attempt}:{turn}:{purpose}"
        text += f":{self.draw}" if self.draw else ""
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class EpisodeRunner:
    """Runs episodes under one set of limits; ``threads`` is where blocking environments run."""

    renderer: ChatRenderer
    limits: LimitsConfig
    max_action_tokens: int
    threads: ThreadPool

    async def run(
        self, make_env: Callable[[], Env], actor: TurnPolicy, key: EpisodeKey, beta: float = 1.0
    ) -> Trajectory:
        """Run one episode to its end; a broken one is returned as well, with its reason.

        Raises PolicyGone: where nobody can act any more, that is no ending of this episode.
        """
        started = time.monotonic()
        record = _Record()
        solved = False
        details: dict[str, object] = {}
        env: Env | None = None
        try:
            env = await self._in_thread(make_env)
            reason = await self._turns(env, actor, key, record, started + self.limits.max_seconds)
            solved = await self._in_thread(env.judge)
            details |= env.report()
        except EnvironmentBroken as error:
            reason, details = error.reason, {"error": str(error)}
        except PolicyGone:
            raise
        except PolicyError as error:
            reason, details = StopReason.POLICY_ERROR, {"error": str(error)}
        finally:
            if env is not None:
                await self._in_thread(env.close)
        if record.format_errors:
            details["format_errors"] = record.format_errors
        return Trajectory(
            task_id=key.task_id,
            attempt=key.attempt,
            round_index=key.round_index,
            turns=tuple(record.turns),
            stop_reason=reason,
            solved=solved and reason.is_clean,
            beta=beta,
            duration_s=time.monotonic() - started,
            details=details,
        )

    async def _turns(
        self, env: Env, actor: TurnPolicy, key: EpisodeKey, record: _Record, deadline: float
    ) -> StopReason:
        system, task = await self._in_thread(env.reset)
        record.open(system, task, self.renderer.opening(system, task))
        format_errors = repeats = 0
        for turn in range(self.limits.max_turns):
            if len(record.tokens) + self.max_action_tokens > self.limits.max_tokens:
                return StopReason.CONTEXT_LIMIT
            if time.monotonic() > deadline:
                return StopReason.TIME_LIMIT
            state = State(messages=tuple(record.messages), tokens=record.tokens, seed=key.seed(turn))
            decision = await actor.decide(state, turn)
            repeats = repeats + 1 if record.repeats(decision.action) else 1
            record.act(decision)
            if repeats >= self.limits.max_repeats:
                return StopReason.REPEAT_LIMIT
            text = self.renderer.reply_text(decision.action.tokens)
            if text is None or not text.strip():
                observation = Observation(text=FORMAT_ERROR, understood=False)
            else:
                observation = await self._in_thread(env.step, text)
            if observation.done:
                return StopReason.SUBMITTED
            format_errors = 0 if observation.understood else format_errors + 1
            record.format_errors += not observation.understood
            if format_errors >= self.limits.max_format_errors:
                return StopReason.FORMAT_LIMIT
            reply = observation.text
            record.observe(reply, self.renderer.observation(reply, after=decision.action.tokens))
        return StopReason.TURN_LIMIT

    async def _in_thread(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)


@dataclass
class _Record:
    """The conversation so far, in the three forms that are kept: messages, tokens, turns."""

    messages: list[Message] = field(default_factory=list)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    turns: list[Turn] = field(default_factory=list)
    format_errors: int = 0
    _observation: str = ""
    _prompt: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def open(self, system: str, task: str, tokens: np.ndarray) -> None:
        self.messages = [Message(role="system", content=system)]
        self.observe(task, tokens)

    def observe(self, text: str, tokens: np.ndarray) -> None:
        self.messages.append(Message(role="user", content=text))
        self.tokens = np.concatenate([self.tokens, tokens])
        self._observation, self._prompt = text, tokens

    def repeats(self, action: Action) -> bool:
        return bool(self.turns) and np.array_equal(self.turns[-1].action.tokens, action.tokens)

    def act(self, decision: TurnDecision) -> None:
        self.messages.append(Message(role="assistant", content=decision.action.text))
        self.tokens = np.concatenate([self.tokens, decision.action.tokens])
        self.turns.append(
            Turn(
                observation=self._observation,
                prompt_tokens=self._prompt,
                acted_by=decision.acted_by,
                action=decision.action,
                label=decision.label,
            )
        )
