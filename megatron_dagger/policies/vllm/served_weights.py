"""The weights an engine serves: none, one version, or a mixture that must not be used.

A replacement either succeeds, or leaves the previous version serving where that is possible.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from megatron_dagger.policies.base import PolicyGone
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.verify.canary import Canary

logger = logging.getLogger(__name__)


class WeightLoader(Protocol):
    """The part of VllmEngine that replaces weights."""

    intact: bool  # whether all workers hold the same version

    def load(
        self, source: WeightSource, version: str, digests: Mapping[str, str], canary: Canary | None = None
    ) -> None: ...

    def accept(self, version: str, digests: Mapping[str, str], canary: Canary | None = None) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Empty:
    """No weights have been loaded."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A version of the weights, where it came from and its digests (``weights.verify.digest``)."""

    version: int
    source: WeightSource
    digests: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The workers hold a mixture of versions; ``previous`` was served before."""

    reason: str
    previous: Serving


class ServedWeights:
    """The state of an engine's weights. Written on the engine's thread, read on any."""

    def __init__(self) -> None:
        self.state: Empty | Serving | Broken = Empty()

    def __str__(self) -> str:
        return (
            f"it still serves version {self.state.version}" if isinstance(self.state, Serving) else "it does not serve"
        )

    def serves(self, version: int, digests: Mapping[str, str]) -> bool:
        """Return whether exactly these weights are served."""
        return isinstance(self.state, Serving) and (self.state.version, self.state.digests) == (version, digests)

    def require_serving(self) -> None:
        """Raise PolicyGone unless a version is served."""
        if isinstance(self.state, Empty):
            raise PolicyGone("the student does not serve: it has no weights yet; call sync() first")
        if isinstance(self.state, Broken):
            raise PolicyGone(f"the student does not serve: {self.state.reason}")

    def replace(self, engine: WeightLoader, new: Serving, canary: Canary | None, *, loaded: bool) -> None:
        """Make ``engine`` serve ``new`` while it runs no request. ``loaded``: it was started with these weights.

        Raises what ``engine.load`` and ``engine.accept`` raise. If weights have changed by then, the previous
        version is loaded again from its checkpoint.
        """
        try:
            if loaded:
                engine.accept(str(new.version), new.digests, canary)
            else:
                engine.load(new.source, str(new.version), new.digests, canary)
        except BaseException as error:
            if not engine.intact:
                self._restore(engine, error)
            raise
        self.state = new

    def _restore(self, engine: WeightLoader, error: BaseException) -> None:
        previous = self.state.previous if isinstance(self.state, Broken) else self.state
        if isinstance(previous, Empty):
            return
        reason = f"its weights are mixed since a sync failed ({error}); sync again"
        self.state = Broken(reason=reason, previous=previous)
        if previous.source.from_trainer:  # it holds its newest weights only
            return
        try:
            engine.load(previous.source, str(previous.version), previous.digests)
        except Exception as failure:
            logger.error("version %d cannot be served again: %s", previous.version, failure)
        else:
            self.state = previous
