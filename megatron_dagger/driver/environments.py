"""Open the environment that a run's settings name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_dagger.config import RunConfig
from megatron_dagger.envs.environment import Environment, EnvironmentContext
from megatron_dagger.envs.registry import find_environment


def open_environment(
    config: RunConfig, run_dir: Path, cache_dir: Path, track: Callable[..., Any], stack: ExitStack
) -> Environment:
    """Load the run's environment; ``stack`` closes it. Raises ConfigError, EnvironmentBroken."""
    load = find_environment(config.environment)
    return load(EnvironmentContext(config=config, run_dir=run_dir, cache_dir=cache_dir, track=track, stack=stack))
