"""Open the environment that a run's settings name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_dagger.config import RunConfig
from megatron_dagger.envs.environment import Environment, EnvironmentContext


def open_environment(
    config: RunConfig, run_dir: Path, cache_dir: Path, track: Callable[..., Any], stack: ExitStack
) -> Environment:
    """Load the run's environment; ``stack`` closes it. Raises ConfigError, EnvironmentBroken."""
    if config.swe.train:
        from megatron_dagger.envs.swe.load import load_environment
    elif config.road.stops:
        from megatron_dagger.envs.road import load_environment
    else:
        from megatron_dagger.envs.repo_repair.load import load_environment
    return load_environment(
        EnvironmentContext(config=config, run_dir=run_dir, cache_dir=cache_dir, track=track, stack=stack)
    )
