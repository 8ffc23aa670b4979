"""Start a run from what a finished run has already done, where the settings imply that both do the same.

A run is a function of its settings and seed. So arms that differ only in who acts after round 0 share that round, SFT
with two amounts of labels shares its episodes, and a greedy evaluation shares all the training. The new run's stages
find these results and go on; ``tests/integration/test_study_start.py`` shows that they end as without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from megatron_dagger.config import RunConfig, differing
from megatron_dagger.config.run import CHANGEABLE, LAYOUT
from megatron_dagger.dagger.beta import beta
from megatron_dagger.dagger.context import train_dir
from megatron_dagger.driver.run_dir import COLLECTED, REFERENCES, create_run
from megatron_dagger.recipes import find_recipe
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import TEMPORARY_PREFIX, publish_directory, sync_tree, temporary_name

# Groups of settings, by the beginning of their names
WHO_ACTS = ("dagger.beta.", "dagger.mixing", "dagger.prefix_turns_", "dagger.takeover_turns")  # from round 1 on
TRAINING = ("dagger.aggregation.", "training.")
SAMPLING = ("evaluation_sampling.temperature", "evaluation_sampling.top_p")
SAME = tuple(name for name in CHANGEABLE if name not in (LAYOUT, "rollout.limits.max_seconds"))  # in every digit
EVALUATION = ("evaluation_sampling.", "dagger.evaluat", "dagger.diagnose")


@dataclass(frozen=True, kw_only=True, order=True)
class Shared:
    """What two runs have in common: trained rounds, collected rounds, and the teacher's held-out episodes."""

    trained: int = 0
    collected: int = 0
    references: bool = False


def shared(donor: RunConfig, config: RunConfig) -> Shared:
    """Return which results of a finished ``donor`` a run of ``config`` would make again."""
    differences = differing(donor, config)

    def same_but(*groups: str) -> bool:
        return all(name.startswith((*groups, *SAME)) for name in differences)

    every = config.dagger.rounds + 1
    references = same_but(*WHO_ACTS, *TRAINING, *SAMPLING)
    if same_but(*EVALUATION):
        return Shared(trained=every, collected=every, references=references)
    if same_but(*EVALUATION, *WHO_ACTS):
        return Shared(trained=1, collected=1, references=references)
    if same_but(*EVALUATION, *WHO_ACTS, *TRAINING):
        alone = _teacher_alone(donor) and _teacher_alone(config)
        return Shared(collected=every if alone else 1, references=references)
    return Shared()


def choose_donor(config: RunConfig, finished: Mapping[Path, RunConfig]) -> tuple[Path | None, Shared]:
    """Return the finished run with the most to share, and what that is; (None, nothing) if there is none."""
    choices = {path: shared(donor, config) for path, donor in finished.items()}
    best = max(choices, key=lambda path: astuple(choices[path]), default=None)
    if best is None or choices[best] == Shared():
        return None, Shared()
    return best, choices[best]


def start_from(donor: Path, common: Shared, run_dir: Path, recipe: str, settings: Sequence[str]) -> None:
    """Create the run ``run_dir`` with what it has in ``common`` with ``donor``. Files are linked, not copied.

    A killed call leaves no ``run_dir``. Raises ConfigError as ``create_run``, FileExistsError if the run exists.
    """
    temporary = run_dir.parent / temporary_name(run_dir.name)
    try:
        create_run(find_recipe(recipe)(), temporary, settings, recipe=recipe, here=True)
        for name in ("tasks", "student"):  # some environments' tasks need no files
            if (donor / name).exists():
                _link(donor / name, temporary / name)
        for index in range(common.collected):
            _link_round(donor / COLLECTED, temporary / COLLECTED, index)
        for index in range(common.trained):
            _link(train_dir(donor, index), train_dir(temporary, index))
        if common.references:
            _link_round(donor / REFERENCES, temporary / REFERENCES, 0)
        sync_tree(temporary)
        publish_directory(temporary, run_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _teacher_alone(config: RunConfig) -> bool:
    """Return whether the teacher acts in every turn of every round."""
    betas = [beta(config.dagger.beta, index) for index in range(config.dagger.rounds + 1)]
    return config.dagger.mixing == "per_turn" and min(betas) == 1


def _link_round(donor: Path, store: Path, index: int) -> None:
    """Give ``store`` a sealed round of ``donor``, if that has it."""
    if DataStore.open(donor).manifest(index) is not None:
        name = f"rounds/{index:04d}"
        _link(donor / name, DataStore.create_or_open(store).path / name)


def _link(source: Path, target: Path) -> None:
    """Make a folder ``target`` with links to the files of ``source``, which are replaced, but never changed."""
    shutil.copytree(
        source, target, copy_function=os.link, ignore=shutil.ignore_patterns(f"{TEMPORARY_PREFIX}*", "*.lock")
    )
