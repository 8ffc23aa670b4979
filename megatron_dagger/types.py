"""The words everybody shares: turns, trajectories, labels, stop reasons.

No engine is imported here. Token arrays are 1-D ``numpy.int32``; log-probs are
1-D ``numpy.float32`` of the same length, natural logarithm, at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

SCHEMA_VERSION = 1


class ActedBy(StrEnum):
    """Who chose the action that was executed in a turn."""

    STUDENT = "student"
    TEACHER = "teacher"


class StopReason(StrEnum):
    """Why an episode ended. Only a clean ending may become data."""

    SUBMITTED = "submitted"  # the agent said it was done
    TURN_LIMIT = "turn_limit"
    CONTEXT_LIMIT = "context_limit"
    TIME_LIMIT = "time_limit"  # the episode's wall-clock budget
    REPEAT_LIMIT = "repeat_limit"  # the same reply again and again: it leads nowhere new
    FORMAT_LIMIT = "format_limit"  # too many replies in a row that are no command
    ENVIRONMENT_ERROR = "environment_error"  # the sandbox broke: never data
    OUT_OF_MEMORY = "out_of_memory"  # the sandbox's memory limit: never data
    POLICY_ERROR = "policy_error"  # the engine or the teacher failed: never data

    @property
    def is_clean(self) -> bool:
        """Whether the episode shows what the policies did, and not what broke under them."""
        return self not in _BROKEN

    @property
    def is_finished(self) -> bool:
        """Whether the agent ended the episode itself, right or wrong."""
        return self is StopReason.SUBMITTED


_BROKEN = frozenset({StopReason.ENVIRONMENT_ERROR, StopReason.OUT_OF_MEMORY, StopReason.POLICY_ERROR})


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message; ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a policy sees: the whole conversation so far, as text and as the exact tokens.

    ``tokens`` is (n,) int32, the prompt after which the next action's tokens come: it ends
    with the chat format's assistant header. ``seed`` is unique to the state of one episode.
    """

    messages: tuple[Message, ...]
    tokens: np.ndarray
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One turn of a policy: the text, and the tokens verbatim, end-of-turn token included.

    ``logprobs`` is (n,) float32 under the policy that sampled the tokens, or None for a policy
    that has none. ``weight_version`` is the student's weight version, -1 for other policies.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    weight_version: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One visited state, what was executed there, and what the teacher would have done.

    ``prompt_tokens`` are the tokens that the conversation gained since the last action (for turn
    0 the system and task messages): concatenating prompt and action tokens of all turns gives the
    episode's token stream. ``label`` is the teacher's action in this state, whoever acted. ``teacher_logprobs``
    is (n,) float32, of the action's tokens under the teacher, where it was asked for them.
    """

    observation: str
    prompt_tokens: np.ndarray
    acted_by: ActedBy
    action: Action
    label: Action | None
    teacher_logprobs: np.ndarray | None = None

    @property
    def agrees(self) -> bool:
        """Whether the executed action is, token for token, what the teacher would have done."""
        return self.label is not None and np.array_equal(self.action.tokens, self.label.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One whole episode. ``(round_index, task_id, attempt)`` names it within a run."""

    task_id: str
    attempt: int
    round_index: int
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    solved: bool
    beta: float = 1.0
    duration_s: float = 0.0
    details: dict[str, object] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, str, int]:
        return (self.round_index, self.task_id, self.attempt)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateLabel:
    """A label in an episode: in the state ``tokens[:position]`` the teacher answers ``tokens``.

    ``tokens`` is (m,) int32, end-of-turn token included. Where they equal the episode's own next
    m tokens the label lies on the episode's trunk; else it is a branch after ``position`` tokens.
    ``weight`` multiplies its loss.
    """

    position: int
    tokens: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledEpisode:
    """What training sees of an episode: the executed token stream and the labels kept of it."""

    tokens: np.ndarray
    labels: tuple[StateLabel, ...]
