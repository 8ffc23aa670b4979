"""Environments by name (``tasks.kind``)."""

from __future__ import annotations

from collections.abc import Callable

from megatron_dagger.envs.environment import Environment, EnvironmentContext
from megatron_dagger.parts import find_part

ENTRY_POINTS = "megatron_dagger.environments"
ENVIRONMENTS = {
    "repair": "megatron_dagger.envs.repo_repair.load:load_environment",
    "road": "megatron_dagger.envs.road:load_environment",
    "swe": "megatron_dagger.envs.swe.load:load_environment",
}


def find_environment(name: str) -> Callable[[EnvironmentContext], Environment]:
    """Return the load function of an environment. Raises ConfigError if there is none of that name."""
    load: Callable[[EnvironmentContext], Environment] = find_part(
        name, ENVIRONMENTS, group=ENTRY_POINTS, setting="tasks.kind"
    )
    return load
