"""One round of the store: commits, the seal, and reading before, during and after the seal.

::

    zarr.json                 the round's group; its attributes hold the manifest once it is sealed
    segments/<writer>-<n>     the episodes of one commit (until the seal)
    episodes/                 all episodes, sharded and compressed (after the seal)
    .lock, .tmp-*             the round's lock; unfinished work

Writers hold the lock while names change: for milliseconds in a commit, for the whole of a seal. Readers never take it.
They see only names that a rename put in place, and read ``episodes`` if and only if the manifest exists.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_dagger.store import columns as c
from megatron_dagger.store.atomic import (
    TEMPORARY_PREFIX,
    UnreadableFileError,
    explain_full_disk,
    publish_directory,
    read_json,
    remove_tree,
    sync_tree,
    temporary_name,
    write_json,
)
from megatron_dagger.store.codec import decode
from megatron_dagger.store.columns import Columns
from megatron_dagger.store.errors import CorruptDataError, SealedRoundError, StoreError
from megatron_dagger.store.lock import exclusive
from megatron_dagger.store.manifest import Manifest, RoundDigest
from megatron_dagger.store.segments import (
    SealedEpisodes,
    group_metadata,
    read_segment,
    segment_keys,
    write_group,
    write_segment,
)
from megatron_dagger.types import Trajectory

logger = logging.getLogger(__name__)

Key = tuple[str, int]  # task_id, attempt
_SEGMENT_NAME = re.compile(r"[A-Za-z0-9_].*-[0-9]{6,}")  # does not match .tmp-*


class Round:
    """A round's directory. Safe to use from several threads."""

    def __init__(self, path: Path, index: int, writer: str):
        self.path = path
        self.index = index
        self.writer = writer
        self._keys: dict[str, list[Key]] = {}  # by segment, which never changes
        self._places: dict[Key, str] = {}  # each committed episode's segment, until the seal
        self._sealed: SealedEpisodes | None = None

    def manifest(self) -> Manifest | None:
        """Return the manifest, or None if the round is not sealed. Raises CorruptDataError."""
        path = self.path / "zarr.json"
        if not path.exists():
            return None
        try:
            values = read_json(path)["attributes"].get("manifest")
        except (UnreadableFileError, AttributeError, KeyError, TypeError) as error:
            raise CorruptDataError(f"{path}: unreadable metadata of round {self.index}: {error}") from error
        return None if values is None else Manifest.from_dict(values, path)

    def is_empty(self) -> bool:
        """Return whether the round has no committed episode."""
        return self.manifest() is None and not self._segments()

    def keys(self) -> set[Key]:
        """Return (task_id, attempt) of the committed episodes."""
        return set(self._index().copy()) if self.manifest() is None else set(self._sealed_episodes().keys)

    def commit(self, parts: dict[Key, Columns]) -> list[Key]:
        """Commit the episodes that are not committed yet, all or none of them, and return their keys."""
        self._refuse_sealed()
        while keys := self._new_keys(parts):
            if self._try_commit({key: parts[key] for key in keys}):
                return keys
        return []

    def seal(self) -> Manifest:
        """Compact the segments, write the manifest, remove the segments. Sealing a sealed round changes nothing."""
        if not self.path.is_dir():
            raise self._nothing_to_seal()
        with exclusive(self.path / ".lock"):
            manifest = self.manifest()
            if manifest is None:
                manifest = self._compact()
                logger.info("sealed %s: %s", self.path, manifest.to_dict())
            remove_tree(self.path / "segments")
            for leftover in self.path.glob(f"{TEMPORARY_PREFIX}*"):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
        return manifest

    def episodes(self) -> Iterator[Trajectory]:
        """Yield the committed episodes in (task_id, attempt) order, also when the round is sealed meanwhile."""
        last: Key | None = None
        while True:
            sealed = self.manifest() is not None
            try:
                for key, trajectory in self._iterate_sealed(last) if sealed else self._iterate_open(last):
                    yield trajectory
                    last = key
                return
            except FileNotFoundError:
                if sealed or self.manifest() is None:
                    raise

    def read(self, key: Key) -> Trajectory | None:
        """Return one committed episode, or None if there is none with that key."""
        if self.manifest() is not None:
            source = self._sealed_episodes()
            position = source.position.get(key)
            return None if position is None else decode(source.block(position, position + 1), 0)
        try:
            name = self._index().get(key)
            return None if name is None else decode(read_segment(self._segment(name)), self._keys[name].index(key))
        except FileNotFoundError:
            if self.manifest() is None:
                raise
            return self.read(key)  # the round was sealed meanwhile

    def verify(self) -> int:
        """Read everything, compare it with the checksums and the manifest, and return the number of episodes."""
        expected = self.manifest()
        if expected is None:
            return sum(1 for _ in self.episodes())
        source = SealedEpisodes(self.path / "episodes")
        digest = RoundDigest(self.index)
        for start, stop in source.blocks(0):
            digest.update(source.block(start, stop))
        if digest.manifest() != expected:
            raise CorruptDataError(
                f"{source.path}: the data is not what was sealed: the manifest says {expected.to_dict()}, "
                f"the data gives {digest.manifest().to_dict()}"
            )
        return expected.episodes

    def _new_keys(self, parts: dict[Key, Columns]) -> list[Key]:
        committed = self._index()
        return sorted(key for key in parts if key not in committed)

    def _try_commit(self, parts: dict[Key, Columns]) -> bool:
        """Write ``parts``, in their order, as one segment. Return False if another process committed any of them."""
        temporary = self.path / temporary_name(self.writer)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_segment(temporary, c.join(list(parts.values())))
            sync_tree(temporary)
            with exclusive(self.path / ".lock"):
                self._refuse_sealed()
                if not self._index().keys().isdisjoint(parts):
                    return False
                self._make_groups()
                publish_directory(temporary, self._segment(self._next_segment()))  # the commit point
            return True
        except OSError as error:
            self._refuse_sealed()  # a seal removes unfinished segments: that is why the write failed
            raise explain_full_disk(error, temporary) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _compact(self) -> Manifest:
        loaded = [read_segment(self._segment(name)) for name in self._segments()]
        places = sorted((key, s, i) for s, part in enumerate(loaded) for i, key in enumerate(c.keys(part)))
        if not places:
            raise self._nothing_to_seal()
        columns = c.join([c.cut(loaded[s], i) for _, s, i in places])
        digest = RoundDigest(self.index)
        digest.update(columns)
        manifest = digest.manifest()
        temporary, target = self.path / temporary_name("episodes"), self.path / "episodes"
        try:
            write_group(temporary, columns)
            sync_tree(temporary)
            remove_tree(target)  # left by a seal that was killed before its commit point
            publish_directory(temporary, target)
            metadata = group_metadata({"round": self.index, "manifest": manifest.to_dict()})
            write_json(self.path / "zarr.json", metadata)  # the commit point
        except OSError as error:
            raise explain_full_disk(error, target) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifest

    def _iterate_sealed(self, after: Key | None) -> Iterator[tuple[Key, Trajectory]]:
        source = self._sealed_episodes()
        for start, stop in source.blocks(0 if after is None else source.position[after] + 1):
            columns = source.block(start, stop)
            for index in range(stop - start):
                yield source.keys[start + index], decode(columns, index)

    def _iterate_open(self, after: Key | None) -> Iterator[tuple[Key, Trajectory]]:
        current, columns = None, None
        for key, name in sorted(self._index().copy().items()):
            if after is not None and key <= after:
                continue
            if columns is None or current != name:
                current, columns = name, read_segment(self._segment(name))
            yield key, decode(columns, self._keys[name].index(key))

    def _sealed_episodes(self) -> SealedEpisodes:
        if self._sealed is None:
            self._sealed = SealedEpisodes(self.path / "episodes")
        return self._sealed

    def _index(self) -> dict[Key, str]:
        """Return the segment of every committed episode, of a round that is not sealed.

        Reads only the segments that are new since the last call.
        """
        for name in self._segments():
            if name not in self._keys:
                keys = segment_keys(self._segment(name))
                self._places.update(dict.fromkeys(keys, name))
                self._keys[name] = keys
        return self._places

    def _segments(self) -> list[str]:
        try:
            return sorted(filter(_SEGMENT_NAME.fullmatch, os.listdir(self.path / "segments")))
        except FileNotFoundError:
            return []

    def _segment(self, name: str) -> Path:
        return self.path / "segments" / name

    def _next_segment(self) -> str:
        numbers = [name.removeprefix(f"{self.writer}-") for name in self._segments()]
        return f"{self.writer}-{1 + max((int(n) for n in numbers if n.isdigit()), default=-1):06d}"

    def _make_groups(self) -> None:
        for path, attributes in ((self.path, {"round": self.index}), (self.path / "segments", {})):
            if not (path / "zarr.json").exists():
                write_json(path / "zarr.json", group_metadata(attributes))

    def _refuse_sealed(self) -> None:
        if self.manifest() is not None:
            raise SealedRoundError(f"{self.path}: round {self.index} is sealed and takes no more episodes")

    def _nothing_to_seal(self) -> StoreError:
        return StoreError(f"{self.path}: round {self.index} has no committed episode, so there is nothing to seal")
