"""Which environment a run's tasks come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ENVIRONMENTS = ("repair", "road", "swe")  # ours, which have settings of their own


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """The environment by name: ``repair``, ``swe``, ``road``, that of an installed package, or ``package.module:load``.

    Such a function gets an ``EnvironmentContext`` and returns an ``Environment``, with ``options`` as it likes; see
    megatron_dagger/envs/README.md.
    """

    kind: str = ""  # empty: swe if swe.train is set, road if road.stops is, or else repair
    options: dict[str, Any] = field(default_factory=dict, hash=False)  # of an environment that is not one of ours
