"""One episode: a policy and an environment take turns until the agent submits or a limit is reached.

A failure ends the episode with a typed stop reason and never shows up as an observation. The caller decides which
episodes become data.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from megatron_dagger.config import ConfigError, LimitsConfig
from megatron_dagger.envs.base import Env, Observation
from megatron_dagger.policies.base import BudgetSpent, NoAction, PolicyError, PolicyGone
from megatron_dagger.policies.clock import start_clock
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.text import encodable
from megatron_dagger.types import ActedBy, Action, Message, State, StopReason, Trajectory, Turn

logger = logging.getLogger(__name__)

FORMAT_ERROR = "error: reply with one shell command"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnDecision:
    """One turn: the action that is executed, who chose it, and the teacher's label (None without one)."""

    acted_by: ActedBy
    action: Action
    label: Action | None


class TurnPolicy(Protocol):
    """Chooses and labels the actions of an episode: one policy alone, or student and teacher mixed."""

    async def decide(self, state: State, turn: int) -> TurnDecision:
        """Return the decision for ``state``, in turn ``turn`` (from 0). Raises as Policy.act."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeKey:
    """The identity of an episode within a run, and the seed of all its random numbers.

    ``draw`` re-seeds an episode without changing its identity: 0 for the first draw, 1, 2, ... for retries with new
    random numbers.
    """

    run_seed: int
    round_index: int
    task_id: str
    attempt: int = 0
    draw: int = 0

    def seed(self, turn: int, purpose: str = "sample") -> int:
        """Return a 63-bit seed that depends on this key, the turn and the purpose only."""
        text = f"{self.run_seed}:{self.round_index}:{self.task_id}:{self.attempt}:{turn}:{purpose}"
        text += f":{self.draw}" if self.draw else ""
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class EpisodeRunner:
    """Runs episodes under one set of limits. Environments may block, so their methods run in ``threads``."""

    renderer: ChatRenderer
    limits: LimitsConfig
    max_action_tokens: int
    threads: Executor

    async def run(
        self, make_env: Callable[[], Env], policy: TurnPolicy, key: EpisodeKey, beta: float = 1.0
    ) -> Trajectory:
        """Run one episode and return it, even if it broke (see ``stop_reason``).

        ``beta`` is only recorded. Whatever else the environment or the policy raises ends this episode only. Raises
        PolicyGone, BudgetSpent and ConfigError, since then no other episode can continue either.
        """
        started = time.monotonic()
        record = _EpisodeRecord()
        solved = False
        details: dict[str, object] = {}
        env: Env | None = None
        try:
            env = await self._in_thread(make_env)
            reason = await self._run_turns(env, policy, key, record)
            solved = await self._in_thread(env.judge)
            details |= await self._in_thread(env.report)
        except EnvironmentBroken as error:
            reason, details = error.reason, {"error": str(error)} | record.last_action()
        except PolicyGone:
            raise
        except PolicyError as error:
            reason, details = StopReason.POLICY_ERROR, {"error": str(error)} | record.last_action()
        finally:
            if env is not None:
                await self._close(env)
        if record.no_action:
            details["no_action"] = record.no_action
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

    async def _run_turns(self, env: Env, policy: TurnPolicy, key: EpisodeKey, record: _EpisodeRecord) -> StopReason:
        system, task = map(encodable, await self._in_thread(env.reset))
        clock = start_clock()  # after reset, which may pull an image
        record.open(system, task, self.renderer.opening(system, task))
        format_errors = repeats = 0
        for turn in range(self.limits.max_turns):
            if len(record.tokens) + self.max_action_tokens > self.limits.max_tokens:
                return StopReason.CONTEXT_LIMIT
            if clock.elapsed_s() > self.limits.max_seconds:
                return StopReason.TIME_LIMIT
            state = State(messages=tuple(record.messages), tokens=record.tokens, seed=key.seed(turn))
            try:
                decision = await policy.decide(state, turn)
            except NoAction as error:
                if not turn:
                    raise
                record.no_action = str(error)
                return StopReason.NO_ACTION  # the turns before are data
            except (PolicyError, BudgetSpent, ConfigError):
                raise
            except Exception as error:
                logger.exception("%s, turn %d: the policy failed", key.task_id, turn)
                raise PolicyError(f"{type(error).__name__}: {error}") from error
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
            seen = encodable(observation.text)
            record.observe(seen, self.renderer.observation(seen, after=decision.action.tokens))
        return StopReason.TURN_LIMIT

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        """Return the result of an environment's function. Any error but ConfigError becomes EnvironmentBroken."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)
        except (EnvironmentBroken, ConfigError):
            raise
        except Exception as error:  # a user's environment, or ours before something that nobody thought of
            logger.exception("the environment failed in %s%.500r", getattr(function, "__qualname__", function), args)
            raise EnvironmentBroken(f"{type(error).__name__}: {error}") from error

    async def _close(self, env: Env) -> None:
        """Close an environment, whose episode has ended whether or not that succeeds."""
        try:
            await self._in_thread(env.close)
        except EnvironmentBroken as error:
            logger.warning("an environment could not be closed: %s", error)


@dataclass
class _EpisodeRecord:
    """The conversation so far, as messages, as tokens and as turns."""

    messages: list[Message] = field(default_factory=list)
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    turns: list[Turn] = field(default_factory=list)
    format_errors: int = 0
    no_action: str = ""  # why there was none
    _observation: str = ""
    _prompt: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))

    def last_action(self) -> dict[str, object]:
        """Return the last action's text, for the report of an episode that broke; nothing before the first."""
        return {"last_action": self.turns[-1].action.text} if self.turns else {}

    def open(self, system: str, task: str, tokens: np.ndarray) -> None:
        self.messages = [Message(role="system", content=system)]
        self.observe(task, tokens)

    def observe(self, text: str, tokens: np.ndarray) -> None:
        self.messages.append(Message(role="user", content=text))
        self.tokens = np.concatenate([self.tokens, tokens])
        self._observation, self._prompt = text, tokens

    def repeats(self, action: Action) -> bool:
        return bool(self.turns) and self.turns[-1].action.equals(action)

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
