"""The small files of a run directory, read as they are now: the run may be finished, running or killed.

A stage is done when its JSON file exists. A missing or damaged file reads as not done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dagger.observability.metrics import read_lines
from megatron_dagger.observability.status_file import read_all
from megatron_dagger.store.atomic import UnreadableFileError, read_json

logger = logging.getLogger(__name__)

MANIFESTS = {"collect": "collect.json", "train": "train/manifest.json", "evaluate": "evaluate.json"}


class NoRunError(ValueError):
    """The directory is not a run directory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFiles:
    """The files of a round. A stage that is not done is None. ``steps`` are the lines of the training's metrics."""

    index: int
    collect: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, name: str) -> dict[str, Any] | None:
        """Return the file of the stage ``name``, or None if the stage is not done."""
        values: dict[str, Any] | None = getattr(self, name)
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The small files of a run directory. ``config`` is plain dicts, empty if there is no readable config.yaml.

    ``statuses`` are the run's status files (see ``status_file``), the newest last.
    """

    path: Path
    config: dict[str, Any]
    rounds: list[RoundFiles]
    statuses: list[dict[str, Any]]
    heldout_tasks: frozenset[str]

    @property
    def planned_rounds(self) -> int | None:
        """The total number of rounds, round 0 included, or None if the config does not have it."""
        rounds = (self.config.get("dagger") or {}).get("rounds")
        return rounds + 1 if isinstance(rounds, int) else None

    @property
    def finished_rounds(self) -> int:
        """The number of finished rounds. If only the last round is evaluated, the others end with their training."""
        last_only = (self.config.get("dagger") or {}).get("evaluate_rounds") == "last"
        last = (self.planned_rounds or 0) - 1
        return sum((r.train if last_only and r.index != last else r.evaluate) is not None for r in self.rounds)


def read_run(path: Path) -> RunFiles:
    """Read the files of a run. Raises NoRunError if ``path`` is not a run directory."""
    path = Path(path)
    if not path.is_dir():
        raise NoRunError(f"{path}: there is no such directory")
    if not any((path / name).exists() for name in ("config.yaml", "rounds", "data.zarr")):
        raise NoRunError(f"{path}: not a run directory (it has no config.yaml, rounds or data.zarr)")
    return RunFiles(
        path=path,
        config=_config(path / "config.yaml"),
        rounds=[_round(folder) for folder in sorted((path / "rounds").glob("[0-9]*")) if folder.name.isdigit()],
        statuses=read_all(path),
        heldout_tasks=frozenset(
            str(row["instance_id"]) for row in read_lines(path / "tasks" / "heldout.jsonl") if "instance_id" in row
        ),
    )


def _round(folder: Path) -> RoundFiles:
    stages = {name: _optional(folder / file) for name, file in MANIFESTS.items()}
    return RoundFiles(index=int(folder.name), steps=read_lines(folder / "train" / "metrics.jsonl"), **stages)  # type: ignore[arg-type]


def _config(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s is unreadable: %s", path, error)
        return {}
    return values if isinstance(values, dict) else {}


def _optional(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        values = read_json(path)
    except UnreadableFileError as error:
        logger.warning("%s", error)
        return None
    return values if isinstance(values, dict) else None
