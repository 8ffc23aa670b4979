"""Small deterministic policies for tests and benchmarks.

``encode`` turns a reply into the action's tokens, including the end-of-turn token (``ChatRenderer.action``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from megatron_dagger.policies.base import PolicyError
from megatron_dagger.types import Action, State

Encode = Callable[[str], np.ndarray]


class RandomPolicy:
    """Picks one of ``texts`` at random; the choice depends on the state's seed only."""

    def __init__(self, texts: Sequence[str], encode: Encode, *, seed: int = 0, name: str = "random"):
        if not texts:
            raise ValueError("RandomPolicy needs at least one text")
        self.name = name
        self._texts, self._encode, self._seed = tuple(texts), encode, seed

    async def act(self, state: State) -> Action:
        generator = np.random.default_rng([self._seed, abs(state.seed)])
        text = self._texts[int(generator.integers(len(self._texts)))]
        return Action(text=text, tokens=self._encode(text))


class ReplayPolicy:
    """Answers turn t with ``texts[t]``; t is the number of replies in the conversation.

    It has no state, so any number of episodes can replay at once. Raises PolicyError after the last text.
    """

    def __init__(self, texts: Sequence[str], encode: Encode, *, name: str = "replay"):
        self.name = name
        self._texts, self._encode = tuple(texts), encode

    async def act(self, state: State) -> Action:
        turn = sum(message.role == "assistant" for message in state.messages)
        if turn >= len(self._texts):
            raise PolicyError(f"{self.name}: there is no text for turn {turn}, the script has {len(self._texts)}")
        return Action(text=self._texts[turn], tokens=self._encode(self._texts[turn]))
