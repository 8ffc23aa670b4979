"""Policy: whatever chooses actions. Student, teacher and expert all are one."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from megatron_dagger.types import Action, State


class PolicyError(RuntimeError):
    """The policy could not answer: a request failed, a deadline passed."""


class NoAction(PolicyError):
    """It has none for this state, however often it is asked: its answers hold none, or the state is too long for it."""


class PolicyGone(PolicyError):
    """It answers nobody any more: its engine has ended, its endpoint is down or refuses. No episode can go on."""


class BudgetSpent(RuntimeError):
    """The policy could answer but must not: what it may cost is used up."""


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
