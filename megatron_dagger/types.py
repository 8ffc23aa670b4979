"""The types that all packages share: turns, trajectories, labels, stop reasons.

Imports no engine. Token arrays are 1-D ``numpy.int32``. Log-probs are 1-D ``numpy.float32`` of the same length, in
natural logarithm, at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

SCHEMA_VERSION = 1


class ActedBy(StrEnum):
    """The policy whose action was executed in a turn."""

    STUDENT = "student"
    TEACHER = "teacher"


class StopReason(StrEnum):
    """Why an episode ended. Only episodes with a clean reason become data."""

    SUBMITTED = "submitted"  # the agent declared that it is done
    TURN_LIMIT = "turn_limit"
    CONTEXT_LIMIT = "context_limit"
    TIME_LIMIT = "time_limit"  # the episode's wall-clock budget
    REPEAT_LIMIT = "repeat_limit"  # the same reply too many times in a row
    FORMAT_LIMIT = "format_limit"  # too many replies in a row that hold no command
    NO_ACTION = "no_action"  # the acting teacher had none for a state after the first
    ENVIRONMENT_ERROR = "environment_error"  # the sandbox failed: never data
    OUT_OF_MEMORY = "out_of_memory"  # the sandbox exceeded its memory limit: never data
    POLICY_ERROR = "policy_error"  # the engine or the teacher failed: never data

    @property
    def is_clean(self) -> bool:
        """Whether neither the infrastructure nor a policy failed."""
        return self not in _BROKEN

    @property
    def is_finished(self) -> bool:
        """Whether the agent ended the episode itself, solved or not."""
        return self is StopReason.SUBMITTED


_BROKEN = frozenset({StopReason.ENVIRONMENT_ERROR, StopReason.OUT_OF_MEMORY, StopReason.POLICY_ERROR})


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One chat message. ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The input of a policy: the whole conversation so far, as text and as the exact tokens.

    ``tokens`` is (n,) int32, the prompt of the next action; it ends with the chat format's assistant header.
    ``seed`` is unique to this state of this episode.
    """

    messages: tuple[Message, ...]
    tokens: np.ndarray
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One reply of a policy: the text, and the sampled tokens verbatim, end-of-turn token included.

    ``tokens`` is (n,) int32. ``logprobs`` is (n,) float32 under the policy that sampled the tokens, or None if that
    policy gives none. ``weight_version`` is the student's weight version, and -1 for other policies.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray | None = None
    weight_version: int = -1

    def equals(self, other: Action) -> bool:
        """Whether both are the same, token for token."""
        return np.array_equal(self.tokens, other.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One visited state, the action executed there, and the teacher's action for it.

    ``prompt_tokens`` is (p,) int32: the tokens that the conversation gained since the last action, in turn 0 the system
    and task messages. Prompt and action tokens of all turns, concatenated, are the episode's token stream. ``label``
    is the teacher's action in this state, whoever acted. ``teacher_logprobs`` is (n,) float32, the log-probs of the
    executed action's tokens under the teacher, or None if they were not requested.
    """

    observation: str
    prompt_tokens: np.ndarray
    acted_by: ActedBy
    action: Action
    label: Action | None
    teacher_logprobs: np.ndarray | None = None

    @property
    def agrees(self) -> bool:
        """Whether the executed action equals the teacher's, token for token."""
        return self.label is not None and self.action.equals(self.label)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One episode. ``(round_index, task_id, attempt)`` identifies it within a run.

    ``beta`` is the teacher's intended share of the turns. ``details`` are the environment's notes, as JSON values.
    """

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
    """A label of an episode: after the episode's first ``position`` tokens the teacher answers ``tokens``.

    ``tokens`` is (m,) int32, end-of-turn token included. If they equal the episode's own next m tokens, the label lies
    on the episode's trunk; otherwise it is a branch off it. ``weight`` multiplies the label's loss.
    """

    position: int
    tokens: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledEpisode:
    """An episode as training sees it: the executed token stream, (n,) int32, and the labels to train on."""

    tokens: np.ndarray
    labels: tuple[StateLabel, ...]
