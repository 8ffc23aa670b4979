"""Find the recorded episodes of a run, for the commands that read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dagger.config import ConfigError
from megatron_dagger.driver.run_dir import COLLECTED, EVALUATED, check_round, load_run_config

if TYPE_CHECKING:
    from megatron_dagger.store.aggregated import DataStore
    from megatron_dagger.types import Trajectory


def open_store(run_dir: Path, name: str) -> DataStore | None:
    """Return a run's store, or None if it has none yet."""
    if not (run_dir / name).is_dir():
        return None
    from megatron_dagger.store.aggregated import DataStore

    return DataStore.open(run_dir / name)


def episode_store(run_dir: Path, *, evaluation: bool) -> DataStore:
    """Return the store of a run's collected or evaluated episodes. Raises ConfigError if it has none."""
    load_run_config(run_dir)  # raises if this is not a run
    store = open_store(run_dir, EVALUATED if evaluation else COLLECTED)
    if store is None or not store.rounds():
        raise ConfigError(f"{run_dir} has no {'evaluated' if evaluation else 'collected'} episodes yet")
    return store


def choose_round(run_dir: Path, store: DataStore, round_index: int | None) -> int:
    """Return ``round_index``, or the last round with episodes if it is None. Raises ConfigError if it has none."""
    rounds = store.rounds()
    if round_index is None:
        return rounds[-1]
    check_round(load_run_config(run_dir), round_index)
    if round_index not in rounds:
        raise ConfigError(f"round {round_index} has no episodes; rounds that have: {', '.join(map(str, rounds))}")
    return round_index


def find_episodes(
    run_dir: Path, *, round_index: int | None, evaluation: bool, task: str = "", failed: bool = False
) -> Iterator[Trajectory]:
    """Yield a round's episodes of tasks whose id contains ``task``, by task id; with ``failed``, only unsolved ones.

    ``round_index`` None is the last round. Raises ConfigError if there is no such episode.
    """
    store = episode_store(run_dir, evaluation=evaluation)
    index = choose_round(run_dir, store, round_index)
    keys = sorted(store.committed(index))
    episodes = (store.read(index, key) for key in keys if task in key[0])
    matching = (episode for episode in episodes if not (failed and episode.solved))
    first = next(matching, None)
    if first is None:
        filters = [f"with {task!r} in the task id"] if task else []
        filters += ["that failed"] if failed else []
        options = f"--round {index}{' --evaluation' if evaluation else ''} --list"
        raise ConfigError(
            f"none of round {index}'s {len(keys)} episodes is one {' '.join(filters)}; `megatron-dagger show {run_dir} "
            f"{options}` lists them"
        )
    yield first
    yield from matching
