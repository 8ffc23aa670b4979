"""zarr v3 arrays with checksums: write them, read them, and name the damaged file.

Every chunk is compressed with zstd and checked with CRC-32C, so a flipped bit or a short file raises an error
and never gives a wrong number. Chunks of zeros are written too; otherwise a lost file would read as zeros.
"""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.store.errors import CorruptDataError

logger = logging.getLogger(__name__)

ZSTD_LEVEL = 3


def write_array(
    path: Path,
    data: np.ndarray,
    *,
    chunk_rows: int | None = None,
    chunks_per_shard: int = 1,
    attributes: dict[str, Any] | None = None,
) -> None:
    """Write ``data`` as a zarr array at ``path``. The files are not synced to the disk.

    ``chunk_rows`` splits the array into chunks of that many rows, ``chunks_per_shard`` of them in one file
    (the sharding codec). Without it the array is one chunk.
    """
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    rows = max(1, len(data)) if chunk_rows is None else chunk_rows
    shard_rows = rows * max(1, min(chunks_per_shard, -(-len(data) // rows)))
    width = data.shape[1:]
    array = zarr.create_array(
        store=path,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(rows, *width),
        shards=None if chunk_rows is None else (shard_rows, *width),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        filters=None,
        attributes=attributes,
        zarr_format=3,
        config={"write_empty_chunks": True},
    )
    if data.size:
        array[...] = data


def open_array(path: Path) -> Any:
    """Open a zarr array for reading. Raises FileNotFoundError if there is none, CorruptDataError if it is damaged."""
    import zarr

    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such array")
    try:
        return zarr.open_array(store=path, mode="r", zarr_format=3)
    except Exception as error:
        if not path.is_dir():  # a seal has removed the segment meanwhile
            raise FileNotFoundError(f"{path}: there is no such array") from error
        raise CorruptDataError(f"{path / 'zarr.json'}: unreadable array metadata: {error}") from error


def read_rows(path: Path, array: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows ``start`` to ``stop`` (exclusive) of ``array``, which ``open_array(path)`` returned.

    Raises FileNotFoundError if the array is gone, CorruptDataError with the first damaged or missing chunk file.
    """
    stop = array.shape[0] if stop is None else stop
    if start == stop or 0 in array.shape:
        return np.zeros((stop - start, *array.shape[1:]), array.dtype)
    # zarr reads a missing file and an empty shard as zeros
    files = [file for file, _, _ in _chunk_files(path, array, start, stop)]
    missing = [file for file in files if not file.is_file() or file.stat().st_size == 0]
    if missing and not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such array")
    if missing:
        raise CorruptDataError(f"{missing[0]}: the chunk file is missing or empty")
    try:
        return np.asarray(array[start:stop])
    except Exception as error:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: there is no such array") from error
        raise CorruptDataError(_name_damage(path, array, start, stop, error)) from error


def _name_damage(path: Path, array: Any, start: int, stop: int, error: Exception) -> str:
    for file, first, last in _chunk_files(path, array, start, stop):
        try:
            array[max(first, start) : min(last, stop)]
        except Exception as chunk_error:
            return (
                f"{file}: corrupt chunk (rows {first} to {last}): {chunk_error}; restore the file from a copy, "
                "or remove its round's directory and collect the round again"
            )
    return f"{path}: corrupt array: {error}"


def _chunk_files(path: Path, array: Any, start: int, stop: int) -> list[tuple[Path, int, int]]:
    """Return the files that hold rows ``start`` to ``stop``, each with its first row and its end."""
    rows = (array.shards or array.chunks)[0]
    columns = [range(-(-size // width)) for size, width in zip(array.shape[1:], array.chunks[1:], strict=True)]
    files = []
    for index in range(start // rows, -(-stop // rows)):
        for column in itertools.product(*columns):
            file = path / array.metadata.encode_chunk_key((index, *column))
            files.append((file, index * rows, min((index + 1) * rows, array.shape[0])))
    return files
