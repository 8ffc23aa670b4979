"""Reads a run directory as it is at this moment: finished, at work, or killed.

A stage is done when its json file exists; everything that is missing or half there reads as not done.
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
    """The directory holds no run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundFiles:
    """What a round has written so far; a stage that is not done is None. ``steps`` is its loss curve."""

    index: int
    collect: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None
    steps: list[dict[str, Any]] = field(default_factory=list)

    def stage(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = getattr(self, name)
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """A run directory's small files. ``config`` is plain dicts, empty where there is none.

    ``work`` is what processes said of themselves (see ``status_file``), the last that was written last.
    """

    path: Path
    config: dict[str, Any]
    rounds: list[RoundFiles]
    work: list[dict[str, Any]]
    heldout_tasks: frozenset[str]

    @property
    def planned_rounds(self) -> int | None:
        """Rounds in all, round 0 included, or None where the config does not say."""
        rounds = (self.config.get("dagger") or {}).get("rounds")
        return rounds + 1 if isinstance(rounds, int) else None

    @property
    def finished_rounds(self) -> int:
        """Rounds of which nothing is left to do; where only the last is evaluated, the others end with training."""
        last_only = (self.config.get("dagger") or {}).get("evaluate_rounds") == "last"
        last = (self.planned_rounds or 0) - 1
        return sum((r.train if last_only and r.index != last else r.evaluate) is not None for r in self.rounds)


def read_run(path: Path) -> RunFiles:
    """Read what is there; NoRunError if it is no run directory."""
    path = Path(path)
    if not path.is_dir():
        raise NoRunError(f"{path}: there is no such directory")
    if not any((path / name).exists() for name in ("config.yaml", "rounds", "data.zarr")):
        raise NoRunError(f"{path}: no run directory (it has no config.yaml, rounds or data.zarr)")
    return RunFiles(
        path=path,
        config=_config(path / "config.yaml"),
        rounds=[_round(folder) for folder in sorted((path / "rounds").glob("[0-9]*")) if folder.name.isdigit()],
        work=read_all(path),
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
