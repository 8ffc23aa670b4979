"""The Policy protocol: whatever chooses actions, be it the student, a teacher or an expert program."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from megatron_dagger.types import Action, State


class PolicyError(RuntimeError):
    """The policy could not answer this time: for example a request failed or a deadline passed."""


class NoAction(PolicyError):
    """The policy has no action for this state, and asking again will not help.

    Its answers contain none, or the conversation is too long for its model.
    """


class PolicyGone(PolicyError):
    """The policy can answer no more requests (its engine stopped, its endpoint is down): no episode can continue."""


class BudgetSpent(RuntimeError):
    """The policy may not be asked any more: its token or cost budget is spent."""


@runtime_checkable
class Policy(Protocol):
    """Chooses the next action in any state an episode can reach.

    Implementations serve many episodes at once from one event loop.
    """

    @property
    def name(self) -> str:
        """The policy's name in logs and records."""
        ...

    async def act(self, state: State) -> Action:
        """Return the action for ``state``. Raises PolicyError or one of its subclasses, and BudgetSpent."""
        ...
