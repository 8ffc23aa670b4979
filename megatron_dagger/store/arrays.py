"""zarr v3 arrays with checksums: how they are written, and how damage is found and named.

Every chunk passes zstd and then CRC-32C, so a flipped bit or a short file is an error on reading and
never a wrong number; chunks of zeros are written too, so that a lost file is not taken for zeros.
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
    """Write ``data`` as a zarr array at ``path``; not synced to the disk.

    With ``chunk_rows`` the array is cut into chunks of that many rows, ``chunks_per_shard`` of them to
    a file (the sharding codec); without, it is one chunk.
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
    """Open a zarr array for reading; CorruptDataError when its metadata cannot be read."""
    import zarr

    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such array")
    try:
        return zarr.open_array(store=path, mode="r", zarr_format=3)
    except Exception as error:
        if not path.is_dir():  # gone meanwhile: a seal removes segments
            raise FileNotFoundError(f"{path}: there is no such array") from error
        raise CorruptDataError(f"{path / 'zarr.json'}: unreadable array metadata: {error}") from error


def read_rows(path: Path, array: Any, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows ``start`` to ``stop`` of the array that ``open_array(path)`` gave.

    Raises CorruptDataError with the path of the first damaged or missing chunk file.
    """
    stop = array.shape[0] if stop is None else stop
    if start == stop or 0 in array.shape:
        return np.zeros((stop - start, *array.shape[1:]), array.dtype)
    # zarr takes a missing file, and an empty shard, for zeros
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
        except Exception as found:
            return (
                f"{file}: corrupt chunk (rows {first} to {last}): {found}; restore the file from a copy, "
                "or remove its round's directory and collect the round again"
            )
    return f"{path}: corrupt array: {error}"


def _chunk_files(path: Path, array: Any, start: int, stop: int) -> list[tuple[Path, int, int]]:
    """The files that hold rows start to stop, each with its own first and last row."""
    rows = (array.shards or array.chunks)[0]
    rest = [range(-(-size // width)) for size, width in zip(array.shape[1:], array.chunks[1:], strict=True)]
    found = []
    for index in range(start // rows, -(-stop // rows)):
        for others in itertools.product(*rest):
            file = path / array.metadata.encode_chunk_key((index, *others))
            found.append((file, index * rows, min((index + 1) * rows, array.shape[0])))
    return found
