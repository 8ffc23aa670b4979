"""The aggregated dataset of a run: one zarr v3 store, append-only, for many writers at once.

::

    data.zarr/zarr.json               kind and schema version, checked on opening
    data.zarr/rounds/0003/            one round: rounds.py
    data.zarr/rounds/0003/given_up/   the round's abandoned tasks: abandoned.py

Invariants:

- Readers see committed episodes only. One rename commits an episode and replacing one file seals a round.
  Every state in between reads as the state before, so a process killed at any moment loses nothing that was
  committed and leaves nothing half written.
- An episode (round_index, task_id, attempt) is stored once. A second commit of it is ignored.
- A sealed round never changes. Its content and digest do not depend on the order in which episodes arrived.

Sealing a round holds all of it in memory: about 26 bytes per token, plus its texts.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from megatron_dagger.store.abandoned import FOLDER, AbandonedTasks
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
    """The episodes of a run, by round. Made by ``create_or_open`` or ``open``; safe to use from several threads."""

    def __init__(self, path: Path, writer: str):
        self.path = path
        self.writer = writer
        self._rounds: dict[int, Round] = {}

    @classmethod
    def create_or_open(cls, path: str | Path, *, writer: str = "driver") -> DataStore:
        """Open the store at ``path``; create it if there is none. ``writer`` names the commits of this process.

        Raises StoreError as ``open`` does.
        """
        path = Path(path)
        if not (path / "zarr.json").exists():
            write_json(path / "rounds" / "zarr.json", group_metadata({}))
            write_json(path / "zarr.json", group_metadata({"kind": KIND, "schema_version": SCHEMA_VERSION}))
        return cls.open(path, writer=writer)

    @classmethod
    def open(cls, path: str | Path, *, writer: str = "driver") -> DataStore:
        """Open an existing store. Raises StoreError if there is none, its schema differs, or ``writer`` is invalid."""
        path = Path(path)
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", writer):
            raise StoreError(f"writer {writer!r}: use at most 64 letters, digits, '_', '-' and '.'")
        if not (path / "zarr.json").is_file():
            raise StoreError(f"{path}: there is no data store here (no zarr.json)")
        metadata = read_json(path / "zarr.json")
        attributes = metadata.get("attributes", {}) if isinstance(metadata, dict) else {}
        if attributes.get("kind") != KIND:
            raise StoreError(f"{path}: not a data store of megatron-dagger (kind {attributes.get('kind')!r})")
        if attributes.get("schema_version") != SCHEMA_VERSION:
            raise StoreError(
                f"{path}: schema version {attributes.get('schema_version')!r}, but this program reads "
                f"{SCHEMA_VERSION}; open it with the version of megatron-dagger that wrote it"
            )
        return cls(path, writer)

    def append(self, trajectories: Sequence[Trajectory]) -> list[tuple[int, str, int]]:
        """Commit episodes, and return the keys (round_index, task_id, attempt) that are new. Durable on return.

        The episodes of one round are committed together or not at all. Episodes that any process committed
        before stay as they are; of two with one key in ``trajectories`` the first counts. Raises
        BrokenEpisodeError if an episode did not end cleanly (then nothing is committed), SealedRoundError if
        its round is sealed, DiskFullError if the disk is full.
        """
        parts = {trajectory.key: encode(trajectory) for trajectory in reversed(trajectories)}
        added: list[tuple[int, str, int]] = []
        for round_index, group in groupby(sorted(parts), key=lambda key: key[0]):
            of_round = {(task_id, attempt): parts[round_index, task_id, attempt] for _, task_id, attempt in group}
            added += [(round_index, *key) for key in self._round(round_index).commit(of_round)]
        if len(added) < len(trajectories):
            logger.info("%s: ignored %d episodes that were committed before", self.path, len(trajectories) - len(added))
        return added

    def committed(self, round_index: int) -> set[Key]:
        """Return (task_id, attempt) of the round's committed episodes."""
        return self._round(round_index).keys()

    def abandoned(self, round_index: int) -> AbandonedTasks:
        """Return the round's abandoned tasks. The round's digest does not cover them."""
        return AbandonedTasks(self._round(round_index).path / FOLDER)

    def seal(self, round_index: int) -> Manifest:
        """Compact the round, write its manifest and make it read-only. Sealing a sealed round changes nothing.

        Raises StoreError if the round has no committed episode, CorruptDataError if an episode is damaged.
        """
        return self._round(round_index).seal()

    def manifest(self, round_index: int) -> Manifest | None:
        """Return the round's manifest, or None if it is not sealed."""
        return self._round(round_index).manifest()

    def rounds(self) -> list[int]:
        """Return the rounds that hold committed episodes, sealed or not, in order."""
        names = sorted(int(path.name) for path in (self.path / "rounds").glob("[0-9]*") if path.name.isdigit())
        return [index for index in names if not self._round(index).is_empty()]

    def sealed(self) -> list[int]:
        """Return the sealed rounds, in order."""
        return [index for index in self.rounds() if self.manifest(index) is not None]

    def episodes(self, round_index: int) -> Iterator[Trajectory]:
        """Yield the round's committed episodes in (task_id, attempt) order, read in blocks."""
        return self._round(round_index).episodes()

    def read(self, round_index: int, key: Key) -> Trajectory:
        """Return one committed episode. Raises StoreError if there is none with that key."""
        trajectory = self._round(round_index).read(key)
        if trajectory is None:
            raise StoreError(f"{self.path}: round {round_index} holds no episode {key[0]!r}, attempt {key[1]}")
        return trajectory

    def digest(self) -> str:
        """Return one digest (hex SHA-256) over the sealed rounds; ``manifest.py`` says what it covers."""
        return digest_of(m for m in map(self.manifest, self.rounds()) if m is not None)

    def verify(self) -> dict[int, int]:
        """Read everything, compare it with checksums and manifests, and return the number of episodes by round.

        Raises CorruptDataError, which names the damaged file or the round whose digest differs.
        """
        return {index: self._round(index).verify() for index in self.rounds()}

    def _round(self, index: int) -> Round:
        if index < 0:
            raise StoreError(f"round {index}: rounds count from 0")
        if index not in self._rounds:
            self._rounds[index] = Round(self.path / "rounds" / f"{index:04d}", index, self.writer)
        return self._rounds[index]
