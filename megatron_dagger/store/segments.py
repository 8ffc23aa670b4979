"""Segments and sealed rounds on the disk: two forms of the same columns.

A segment holds the episodes of one commit. It is a single zarr array of bytes with all columns one after another,
because the time of a commit grows with its number of files. The array's attributes list the episodes and the place of
each column. Sealing turns a round's segments into a group with one array per column. Both are immutable once they are
in place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.store import columns as c
from megatron_dagger.store.arrays import open_array, read_rows, write_array
from megatron_dagger.store.atomic import UnreadableFileError, read_json, write_json
from megatron_dagger.store.columns import LAYOUT, Columns
from megatron_dagger.store.errors import CorruptDataError
from megatron_dagger.types import SCHEMA_VERSION

CHUNK_ROWS = {"turns": 1024, "episodes": 1024, "episode_floats": 1024}
DEFAULT_CHUNK_ROWS = 65536  # 256 KiB of tokens: the least that reading an episode decompresses
CHUNKS_PER_SHARD = 64  # 16 MiB of tokens per file, before compression
_BYTES_PER_COUNT = {"token_count": 12, "label_count": 8, "text_count": 1}  # in memory: ids, log-probs; texts


def write_segment(path: Path, columns: Columns) -> None:
    """Write ``columns`` as a segment at ``path``. The caller syncs it and puts it in place."""
    layout, parts, offset = {}, [], 0
    for name in c.stored_arrays(columns):
        raw = np.ascontiguousarray(getattr(columns, name), LAYOUT[name][0]).tobytes()
        layout[name] = [offset, len(raw)]
        parts.append(raw)
        offset += len(raw)
    data = np.frombuffer(b"".join(parts), np.uint8)
    write_array(path, data, attributes={"keys": c.keys(columns), "layout": layout, **_schema()})


def read_segment(path: Path) -> Columns:
    """Return the columns of a segment. Raises FileNotFoundError if it is gone because its round was sealed."""
    array = open_array(path)
    layout = dict(array.attrs).get("layout", {})
    known = set(LAYOUT) - set(c.OPTIONAL) <= set(layout) <= set(LAYOUT)
    if not known or max(sum(place) for place in layout.values()) != array.shape[0]:
        raise CorruptDataError(f"{path / 'zarr.json'}: the segment's attributes do not describe its data")
    raw = read_rows(path, array)
    arrays = {}
    for name, (start, size) in layout.items():
        dtype, width = LAYOUT[name]
        values = raw[start : start + size].view(dtype)
        arrays[name] = values.reshape(-1, width) if width else values
    return c.from_stored_arrays(arrays)


def segment_keys(path: Path) -> list[tuple[str, int]]:
    """Return (task_id, attempt) of every episode in a segment or a group, from its attributes alone."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such segment or group")
    try:
        attributes = read_json(path / "zarr.json")["attributes"]
        return [(task_id, attempt) for task_id, attempt in attributes["keys"]]
    except (UnreadableFileError, KeyError, TypeError, ValueError) as error:
        if not path.is_dir():  # a seal has removed it meanwhile
            raise FileNotFoundError(f"{path}: there is no such segment or group") from error
        raise CorruptDataError(f"{path / 'zarr.json'}: unreadable metadata: {error}") from error


def write_group(path: Path, columns: Columns) -> None:
    """Write ``columns`` as a group of sharded, compressed arrays at ``path``. The caller syncs it."""
    names = c.stored_arrays(columns)
    optional = [name for name in names if name in c.OPTIONAL]
    write_json(path / "zarr.json", group_metadata({"keys": c.keys(columns), "later": optional, **_schema()}))
    for name in names:
        rows = CHUNK_ROWS.get(name, DEFAULT_CHUNK_ROWS)
        write_array(path / name, getattr(columns, name), chunk_rows=rows, chunks_per_shard=CHUNKS_PER_SHARD)


def group_metadata(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the content of ``zarr.json`` for a zarr v3 group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


class SealedEpisodes:
    """The episodes of a sealed round, read in blocks or one by one."""

    def __init__(self, path: Path):
        self.path = path
        self.keys = segment_keys(path)
        self.position = {key: index for index, key in enumerate(self.keys)}
        optional = read_json(path / "zarr.json")["attributes"].get("later", [])
        names = [name for name in LAYOUT if name not in c.OPTIONAL or name in optional]
        self._arrays = {name: open_array(path / name) for name in names}
        for name, array in self._arrays.items():
            dtype, width = LAYOUT[name]
            if array.dtype != dtype or array.shape[1:] != ((width,) if width else ()):
                raise CorruptDataError(
                    f"{path / name}: expected {dtype} of width {width}, found {array.dtype} of {array.shape}"
                )
        self._episodes = self._read("episodes", 0, len(self.keys))
        self._floats = self._read("episode_floats", 0, len(self.keys))

    def block(self, first: int, last: int) -> Columns:
        """Return episodes ``first`` to ``last`` (exclusive), read with one access per array."""
        rows = self._episodes[first:last].copy()
        parts: dict[str, np.ndarray] = {"episode_floats": self._floats[first:last]}
        names = {"turn": ["turns"], "token": ["tokens", "logprobs", "teacher_logprobs"],
                 "label": ["label_tokens", "label_logprobs"], "text": ["text"]}  # fmt: skip
        for unit, arrays in names.items():
            start_column, count_column = c.EPISODE[f"{unit}_start"], c.EPISODE[f"{unit}_count"]
            start = int(rows[0, start_column])
            stop = int(rows[-1, start_column] + rows[-1, count_column])
            rows[:, start_column] -= start
            for name in arrays:
                if name in self._arrays:
                    parts[name] = self._read(name, start, stop)
        return c.from_stored_arrays({"episodes": rows, **parts})

    def blocks(self, first: int, bytes_per_block: int = 32 << 20) -> list[tuple[int, int]]:
        """Return ranges [start, stop) that cover the episodes from ``first`` on, of about ``bytes_per_block`` each."""
        counts = self._episodes[:, [c.EPISODE[name] for name in _BYTES_PER_COUNT]]
        sizes = counts @ list(_BYTES_PER_COUNT.values())
        ranges, start, size = [], first, 0
        for index in range(first, len(sizes)):
            if size and size + sizes[index] > bytes_per_block:
                ranges.append((start, index))
                start, size = index, 0
            size += int(sizes[index])
        if start < len(sizes):
            ranges.append((start, len(sizes)))
        return ranges

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        array = self._arrays[name]
        if stop > array.shape[0]:
            raise CorruptDataError(f"{self.path / name}: {stop} rows expected, {array.shape[0]} found")
        return read_rows(self.path / name, array, start, stop)


def _schema() -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "turn_columns": list(c.TURN_COLUMNS),
        "episode_columns": list(c.EPISODE_COLUMNS),
        "executors": [str(value) for value in c.ACTED_BY],
        "stop_reasons": [str(value) for value in c.STOP_REASONS],
    }
