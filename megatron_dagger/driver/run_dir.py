"""A run directory's settings: create a run, change an existing one, read its config.

``config.yaml`` holds the resolved settings. ``origin.yaml`` holds what the run was created from (recipe and
settings). With it, a job script that is submitted again is not mistaken for a request to change settings.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dagger.config import ConfigError, RunConfig, differing, dump_yaml, load_yaml, override, to_dict
from megatron_dagger.config.base import current_name, leaves, parse_value, require
from megatron_dagger.config.run import BETWEEN_ROUNDS, CHANGEABLE, LAYOUT, fixed_differences
from megatron_dagger.dagger.context import train_dir, train_manifest
from megatron_dagger.driver.checks import check_run, check_trainer
from megatron_dagger.observability.metrics import append_line
from megatron_dagger.store.atomic import write_text
from megatron_dagger.store.fence import claim

logger = logging.getLogger(__name__)

CONFIG, ORIGIN = "config.yaml", "origin.yaml"
CHANGES = "changes.jsonl"  # a line for each change of the settings: its time, and each setting's old and new value
COLLECTED, EVALUATED = "data.zarr", "evaluations.zarr"  # the stores of episodes
REFERENCES, TAKEOVERS = "references.zarr", "takeovers.zarr"  # the stores of the evaluations' diagnosis
_LISTED = 5  # settings named in a message


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The origin of a run: the recipe's name, if there was one, the NAME=VALUE settings given with it, and --gpu."""

    recipe: str | None = None
    settings: tuple[str, ...] = ()
    gpu: str | None = None


def cache_dir() -> Path:
    """Return where packages and tasks are kept between runs; ``MEGATRON_DAGGER_CACHE`` overrides the default."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megatron-dagger"
    return Path(os.environ.get("MEGATRON_DAGGER_CACHE", default))


def load_run_config(run_dir: Path) -> RunConfig:
    """Return the config of an existing run. Raises ConfigError if ``run_dir`` is not one."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory (it has no {CONFIG}){_recipe_hint(run_dir)}")
    return load_yaml(RunConfig, path)


def create_run(
    base: RunConfig,
    run_dir: Path,
    settings: Sequence[str] = (),
    *,
    recipe: str | None = None,
    here: bool = False,
    gpu: str | None = None,
    dry_run: bool = False,
) -> RunConfig:
    """Create a run from ``base`` (of ``recipe``) with NAME=VALUE ``settings``, and return its config.

    If the run exists, its settings must be the same, except for those that can be changed: a value that differs
    from the one the run was created with is a change, as by ``change_run``. A run without a committed episode may be
    created anew with any settings. ``here``, ``gpu``: see ``check_run``, which refuses a run that cannot work before
    anything is written. With ``dry_run`` nothing is written. Raises ConfigError.
    """
    config, origin = _absolute(override(base, list(settings))), load_origin(run_dir)
    existing = load_run_config(run_dir) if (run_dir / CONFIG).exists() else None
    requested = _new_requests(settings, origin)
    conflicts = fixed_differences(existing, config) if existing else []
    if conflicts == ["dagger.rounds"] and not _affecting(requested, conflicts):
        conflicts = []  # the rounds were raised, and an older script does not ask to lower them
    if existing is None or (conflicts and not has_episodes(run_dir)):
        check_run(config, here=here, gpu=gpu)
        if not dry_run:
            _write(
                run_dir, config, Origin(recipe=recipe, settings=tuple(settings), gpu=gpu), replaces=existing is not None
            )
        return config
    if conflicts:
        creator = f"was created by recipe {origin.recipe} and " if origin.recipe else ""
        raise ConfigError(
            f"{run_dir} {creator}has other settings ({_first_few(conflicts)}): resume it with "
            f"`megatron-dagger run {run_dir}` (no --recipe), or name another directory"
        )
    differences = differing(existing, config)
    if changes := _affecting(requested, differences):
        return change_run(run_dir, changes, dry_run=dry_run)
    if differences:
        logger.warning("%s: the run keeps its own %s", run_dir, _first_few(differences))
    return existing


def change_run(run_dir: Path, settings: Sequence[str], *, take_over: bool = False, dry_run: bool = False) -> RunConfig:
    """Change NAME=VALUE ``settings`` of an existing run, and return its config; keep a record in CHANGES.

    Raises ConfigError for a setting that changes results that exist, LockedError while the run is worked on.
    """
    existing = load_run_config(run_dir)
    config = override(existing, list(settings))
    differences = differing(existing, config)
    if conflicts := fixed_differences(existing, config):
        raise ConfigError(
            f"{_first_few(conflicts)}: an existing run's results depend on it, so it cannot be changed; start a new "
            f"run with --recipe. These can be changed: {', '.join(CHANGEABLE)}; between rounds "
            f"{', '.join(BETWEEN_ROUNDS)}; dagger.rounds can be raised"
        )
    if not differences:
        return config
    check_trainer(config, cuda=None)
    _check_no_half_trained_round(run_dir, existing, [name for name in differences if name in BETWEEN_ROUNDS])
    if not dry_run:
        with claim(run_dir, take_over=take_over):
            old, new = (dict(leaves(to_dict(settings_of))) for settings_of in (existing, config))
            changed = {name: {"from": old[name], "to": new[name]} for name in differences}
            append_line(run_dir / CHANGES, {"time": time.time(), "settings": changed})
            write_text(run_dir / CONFIG, dump_yaml(config))
    return config


def _check_no_half_trained_round(run_dir: Path, config: RunConfig, names: Sequence[str]) -> None:
    """Raise ConfigError if ``names`` would change within a round's training."""
    for index in range(config.dagger.rounds + 1) if names else ():
        half_trained = any(train_dir(run_dir, index).glob("checkpoint-step-*"))
        require(
            not half_trained or train_manifest(run_dir, index).exists(),
            f"{_first_few(names)} can be changed between rounds, and round {index} is half trained: let its training "
            "end first (`megatron-dagger train RUN --round N`)",
        )


def load_origin(run_dir: Path) -> Origin:
    """Return the origin of a run; an empty one if an older version, which did not record it, created the run."""
    path = run_dir / ORIGIN
    return load_yaml(Origin, path) if path.is_file() else Origin()


def has_episodes(run_dir: Path) -> bool:
    """Return whether a run has a committed episode."""
    rounds = run_dir / COLLECTED / "rounds"
    return any(next(rounds.glob(pattern), None) for pattern in ("*/episodes", "*/segments/*"))


def check_round(config: RunConfig, round_index: int) -> None:
    """Raise ConfigError unless the run has this round."""
    rounds = config.dagger.rounds
    if not 0 <= round_index <= rounds:
        raise ConfigError(f"round {round_index}: this run has rounds 0 to {rounds} (dagger.rounds={rounds})")


def _write(run_dir: Path, config: RunConfig, origin: Origin, *, replaces: bool) -> None:
    """Write a new run's settings. If it ``replaces`` a run without an episode, remove the files of that run."""
    with claim(run_dir) if replaces else nullcontext():
        if replaces:
            logger.warning("%s had no episode yet: its settings are replaced", run_dir)
            for name in ("tasks", "student", COLLECTED, EVALUATED, REFERENCES, TAKEOVERS):
                shutil.rmtree(run_dir / name, ignore_errors=True)
        write_text(run_dir / ORIGIN, dump_yaml(origin))
        write_text(run_dir / CONFIG, dump_yaml(config))


def _absolute(config: RunConfig) -> RunConfig:
    """Return ``config`` with an absolute ``init_checkpoint``: jobs may start in another directory."""
    if config.init_checkpoint is None:
        return config
    return replace(config, init_checkpoint=str(Path(config.init_checkpoint).resolve()))


def _new_requests(settings: Sequence[str], origin: Origin) -> dict[str, str]:
    """Return the settings that the run was not created with, by name: those are wishes, the others an old script's.

    The layout is always a wish: it says which nodes the job has.
    """
    created = {_parsed(setting) for setting in origin.settings}
    named = {setting: _parsed(setting) for setting in settings}
    return {
        name: text for text, (name, value) in named.items() if name.startswith(LAYOUT) or (name, value) not in created
    }


def _affecting(requested: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """Return those of the requested settings that set one of ``names``, alone or with its group."""
    return [
        setting
        for group, setting in requested.items()
        if any(name == group or name.startswith(f"{group}.") for name in names)
    ]


def _parsed(setting: str) -> tuple[str, str]:
    return current_name(RunConfig, setting.partition("=")[0].strip()), repr(parse_value(setting))


def _first_few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _recipe_hint(run_dir: Path) -> str:
    from megatron_dagger.recipes import RECIPES

    if str(run_dir) in RECIPES:
        return f"; {run_dir} is a recipe: megatron-dagger run runs/{run_dir} --recipe {run_dir}"
    return "; start a run with `megatron-dagger run RUN --recipe NAME` (`megatron-dagger recipes` lists them)"
