"""The aggregated dataset of a run: one zarr v3 store, append-only, for many writers at once.

::

    data.zarr/zarr.json          schema version, checked on opening
    data.zarr/rounds/0003/       see rounds.py; its given_up/: see given_up.py

Invariants. Readers see committed episodes only. An episode is committed by one rename, a round is
sealed by replacing one file, and every state in between reads as the state before: a process killed
at any moment loses nothing that was committed and leaves nothing half there. An episode
(round, task_id, attempt) is kept once; whoever commits it second is ignored. A sealed round never
changes, and its content and digest do not depend on the order in which episodes arrived.

A seal holds its round in memory (about twice 13 bytes a token, and the texts).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from megatron_dagger.store.abandoned import AbandonedTasks
from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.store.codec import encode
from megatron_dagger.store.errors import StoreError
from megatron_dagger.store.manifest import Manifest, digest_of
from megatron_dagger.store.rounds import Key, Round
from megatron_dagger.store.segments import group_metadata
from megatron_dagger.types import SCHEMA_VERSION, Trajectory

logger = logging.getLogger(__name__)

KIND = "megatron-dagger episodes"


class DataStore:
    """Open with ``create_or_open`` or ``open``. Objects may be used from several threads."""

    def __init__(self, path: Path, writer: str):
        self.path = path
        self.writer = writer
        self._rounds: dict[int, Round] = {}

    @classmethod
    def create_or_open(cls, path: str | Path, *, writer: str = "driver") -> DataStore:
        """Open the store at ``path``, made if it is not there. ``writer`` names this process' commits."""
        path = Path(path)
        if not (path / "zarr.json").exists():
            write_json(path / "rounds" / "zarr.json", group_metadata({}))
            write_json(path / "zarr.json", group_metadata({"kind": KIND, "schema_version": SCHEMA_VERSION}))
        return cls.open(path, writer=writer)

    @classmethod
    def open(cls, path: str | Path, *, writer: str = "driver") -> DataStore:
        """Open a store that is there; StoreError if it is not, or has another schema."""
        path = Path(path)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", writer):
            raise StoreError(f"writer {writer!r}: use letters, digits, '_', '-' and '.', at most 64")
        if not (path / "zarr.json").is_file():
            raise StoreError(f"{path}: there is no data store here (no zarr.json)")
        metadata = read_json(path / "zarr.json")
        attributes = metadata.get("attributes", {}) if isinstance(metadata, dict) else {}
        if attributes.get("kind") != KIND:
            raise StoreError(f"{path}: not a data store of megatron-dagger (kind {attributes.get('kind')!r})")
        if attributes.get("schema_version") != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: schema version {attributes.get('schema_version')!r}, but this program reads "
                f"{SCHEMA_VERSION}: open it with the version of megatron-dagger that wrote it"
            )
        return cls(path, writer)

    def append(self, trajectories: Sequence[Trajectory]) -> list[tuple[int, str, int]]:
        """Commit episodes; durable when this returns.

        Each round's share is one commit: all of it or nothing. Returns the keys that were new;
        episodes committed before (by whomever) stay as they are, and of two of one key here the first
        counts. Raises BrokenEpisodeError if any episode did not end cleanly (then nothing is
        committed), SealedRoundError if its round is sealed, DiskFullError if there is no room.
        """
        parts = {trajectory.key: encode(trajectory) for trajectory in reversed(trajectories)}
        added: list[tuple[int, str, int]] = []
        for round_index, group in groupby(sorted(parts), key=lambda key: key[0]):
            mine = {(task_id, attempt): parts[round_index, task_id, attempt] for _, task_id, attempt in group}
            added += [(round_index, *key) for key in self._round(round_index).commit(mine)]
        if len(added) < len(trajectories):
            logger.info("%s: %d episodes were committed before", self.path, len(trajectories) - len(added))
        return added

    def committed(self, round_index: int) -> set[Key]:
        """(task_id, attempt) of the round's committed episodes."""
        return self._round(round_index).keys()

    def given_up(self, round_index: int) -> AbandonedTasks:
        """The tasks of which the round will have no episode; no part of its digest."""
        return AbandonedTasks(self._round(round_index).path / "given_up")

    def seal(self, round_index: int) -> Manifest:
        """Compact the round, write its manifest, make it read-only. Doing it again changes nothing.

        Raises StoreError if the round has no committed episode, CorruptDataError if one is damaged.
        """
        return self._round(round_index).seal()

    def manifest(self, round_index: int) -> Manifest | None:
        """The round's manifest, or None while it is not sealed."""
        return self._round(round_index).manifest()

    def rounds(self) -> list[int]:
        """Rounds that hold committed episodes, sealed or not."""
        names = sorted(int(path.name) for path in (self.path / "rounds").glob("[0-9]*") if path.name.isdigit())
        return [index for index in names if not self._round(index).is_empty()]

    def sealed(self) -> list[int]:
        """Rounds that are sealed."""
        return [index for index in self.rounds() if self.manifest(index) is not None]

    def episodes(self, round_index: int) -> Iterator[Trajectory]:
        """The round's committed episodes in (task_id, attempt) order, read in blocks."""
        return self._round(round_index).episodes()

    def read(self, round_index: int, key: Key) -> Trajectory:
        """One committed episode; StoreError if there is none of that key."""
        found = self._round(round_index).read(key)
        if found is None:
            raise StoreError(f"{self.path}: round {round_index} holds no episode {key[0]!r}, attempt {key[1]}")
        return found

    def digest(self) -> str:
        """One digest over the sealed rounds; ``manifest.py`` says what it covers."""
        return digest_of(m for m in map(self.manifest, self.rounds()) if m is not None)

    def verify(self) -> dict[int, int]:
        """Read everything and compare it with checksums and manifests; returns episodes by round.

        Raises CorruptDataError that names the damaged file, or the round whose digest is wrong.
        """
        return {index: self._round(index).verify() for index in self.rounds()}

    def _round(self, index: int) -> Round:
        if index < 0:
            raise StoreError(f"round {index}: rounds count from 0")
        if index not in self._rounds:
            self._rounds[index] = Round(self.path / "rounds" / f"{index:04d}", index, self.writer)
        return self._rounds[index]
