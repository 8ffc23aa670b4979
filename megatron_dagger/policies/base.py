"""Policy: whatever chooses actions. Student, teacher and expert all are one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from megatron_dagger.types import Action, State


class PolicyError(RuntimeError):
    """The policy could not answer (engine gone, endpoint down, deadline passed)."""


@runtime_checkable
class Policy(Protocol):
    """Chooses the next action in any state an episode can reach.

    Implementations are safe to call for many episodes at once from one event loop.
    """

    @property
    def name(self) -> str:
        """What logs and records call it."""
        ...

    async def act(self, state: State) -> Action:
        """Return the action for ``state``; raise PolicyError if there is none to be had."""
        ...
