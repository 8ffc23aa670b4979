"""The Env protocol: one task that an agent works on, turn by turn, until it is judged.

An Env is synchronous and used from one thread at a time; the rollout runs many of them in threads. Whoever opens one
closes it (Envs are context managers), also after an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The text that the agent reads after an action.

    ``done``: the action ended the episode. ``understood`` is False if the action was no command at all.
    """

    text: str
    done: bool = False
    understood: bool = True


class Env(Protocol):
    """One task, one episode: reset once, step per turn, judge at the end. All raise sandbox.base.EnvironmentBroken.

    A class that inherits from it needs only ``task_id``, ``reset``, ``step`` and ``judge``.
    """

    task_id: str

    def reset(self) -> tuple[str, str]:
        """Prepare the task; return the system message and the task message."""
        ...

    def step(self, command: str) -> Observation:
        """Execute one command of the agent."""
        ...

    def judge(self) -> bool:
        """Return whether the task is solved, by its real tests in a fresh copy."""
        ...

    def report(self) -> dict[str, object]:
        """Return details to store with the judged episode, as JSON values."""
        return {}

    def close(self) -> None:
        """Release everything. May be called twice, and before ``reset``."""
        return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def truncate(text: str, limit: int) -> str:
    """Return ``text``, or its head and tail around a line that counts the cut characters if it exceeds ``limit``."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"
