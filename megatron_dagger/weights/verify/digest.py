"""Digests of weights in canonical space, computed by the ranks of any layout from their own shards.

The digest of a canonical tensor is the sum, modulo 2^64, of the xxh3-64 hashes of its tiles' bytes (contiguous,
little-endian), each seeded with the tile's number, written together with dtype and shape. A wrong value, a wrong cast
and a misplaced block all change it, and the shares of several ranks are combined by addition. It detects mistakes and
damage, not deliberate collisions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, Box
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families.base import is_numpy
from megatron_dagger.weights.verify.hash_tiles import Tiles, hash_tiles

_MODULUS = 2**64
_PORTION_BYTES = 64 << 20  # fetched from a GPU at once

# The dtype, and for each run of tiles (first, past the last) the sum of their hashes.
Share = tuple[str, dict[tuple[int, int], int]]
Shares = dict[str, Share]  # by canonical name


def digest_shares(blocks: Sequence[Block], tensor: Any, model: ModelConfig) -> Shares:
    """Return the shares of a rank's own tensor, made up of ``blocks``, in the digests of canonical tensors.

    ``tensor``: torch or numpy, any dtype, any device. A leading dimension of experts is split up. Raises WeightMapError
    if a block is not whole tiles.
    """
    table = hash_tiles(model)
    shares: Shares = {}
    tensor = tensor if is_numpy(tensor) else tensor.detach()
    for block in blocks:
        for single, values in _each_expert(block, tensor):
            tiles = table[single.name]
            run = tiles.within(single)
            _, sums = shares.setdefault(single.name, (_dtype(values), {}))
            sums[run.start, run.stop] = _sum_of_hashes(values, tiles, run)
    return shares


def canonical_digests(tensors: Iterable[tuple[str, Any]], model: ModelConfig) -> dict[str, str]:
    """Return the digests of whole canonical tensors. Raises ValueError if a name occurs twice."""
    return merge([digest_whole(tensors, model)], model)


def digest_whole(tensors: Iterable[tuple[str, Any]], model: ModelConfig) -> Shares:
    """Return the shares of a rank that holds these canonical tensors whole. Raises ValueError for a repeated name."""
    shares: Shares = {}
    for name, tensor in tensors:
        if name in shares:
            raise ValueError(f"tensor {name!r} occurs twice")
        whole = Box((0,) * len(tensor.shape), tuple(tensor.shape))
        shares |= digest_shares([Block(name, whole, whole.start)], tensor, model)
    return shares


def merge(ranks: Sequence[Mapping[str, Share]], model: ModelConfig) -> dict[str, str]:
    """Combine the ranks' shares into the digests of the tensors that they hold together, in the model's order.

    Raises WeightMapError, naming the tensor and the rank, if replicas differ or if a tensor is only partly held.
    """
    held: dict[str, tuple[str, dict[tuple[int, int], tuple[int, int]]]] = {}
    for rank, shares in enumerate(ranks):
        for name, (dtype, sums) in shares.items():
            first_dtype, runs = held.setdefault(name, (dtype, {}))
            if dtype != first_dtype:
                raise WeightMapError(f"tensor {name!r} is {first_dtype} on one rank and {dtype} on rank {rank}")
            for run, value in sums.items():
                first_rank, first_value = runs.setdefault(run, (rank, value))
                if first_value != value:
                    raise WeightMapError(f"ranks {first_rank} and {rank} hold different copies of tensor {name!r}")
    digests = {}
    for name, tiles in hash_tiles(model).items():
        if name in held:
            dtype, runs = held[name]
            _check_whole(name, sorted(runs), tiles)
            digests[name] = f"{dtype} {tiles.shape} {sum(value for _, value in runs.values()) % _MODULUS:016x}"
    return digests


def compare(expected: Mapping[str, str], received: Mapping[str, str]) -> str | None:
    """Return the first difference between two sets of digests, naming the tensor, or None if they are equal."""
    for name in expected:
        if name not in received:
            return f"tensor {name!r} was not received"
        if expected[name] != received[name]:
            return f"tensor {name!r} differs: sent {expected[name]}, received {received[name]}"
    extra = [name for name in received if name not in expected]
    return f"tensor {extra[0]!r} was received but never sent" if extra else None


def _check_whole(name: str, runs: list[tuple[int, int]], tiles: Tiles) -> None:
    stops = [0, *(stop for _, stop in runs)]
    for stop, (start, _) in zip(stops, [*runs, (tiles.count, 0)], strict=True):
        if start != stop:
            problem = "no rank holds" if start > stop else "ranks hold overlapping shares with"
            raise WeightMapError(f"{problem} tile {min(start, stop)} of the {tiles.count} of tensor {name!r}")


def _each_expert(block: Block, tensor: Any) -> Iterable[tuple[Block, Any]]:
    start, box = block.start, block.canonical
    values = tensor[tuple(slice(s, s + n) for s, n in zip(start, box.shape, strict=True))]
    if "{}" not in block.name:
        yield block, values
        return
    for index in range(box.shape[0]):
        inner = Box(box.start[1:], box.shape[1:])
        yield Block(block.name.format(box.start[0] + index), inner, start[1:]), values[index]


def _sum_of_hashes(values: Any, tiles: Tiles, run: range) -> int:
    contents = _tiles_of_columns(values, tiles.extent) if tiles.axis == 1 else _tiles_of_rows(values, tiles.extent)
    return sum(xxhash.xxh3_64_intdigest(data, seed=tile) for tile, data in zip(run, contents, strict=True))


def _tiles_of_columns(values: Any, extent: int) -> Iterator[memoryview]:
    """Yield the bytes of ``extent`` columns at a time, each overwriting the last. ``extent`` divides the columns."""
    tile = _host_buffer(values[:, :extent])
    for first in range(0, values.shape[1], extent):
        tile[...] = values[:, first : first + extent]
        yield _bytes(tile)


def _tiles_of_rows(values: Any, extent: int) -> Iterator[memoryview]:
    """Yield the bytes of ``extent`` rows at a time. The last tile may have fewer."""
    size = extent * (values[:1].nbytes or 1)
    step = extent * max(1, _PORTION_BYTES // size)
    for first in range(0, values.shape[0], step):
        data = _bytes(values[first : first + step])
        yield from (data[start : start + size] for start in range(0, len(data), size))


def _host_buffer(tensor: Any) -> Any:
    """Return an empty contiguous array like the tensor in host memory, page-locked if the tensor is on a GPU."""
    if is_numpy(tensor):
        import numpy as np

        return np.empty(tensor.shape, tensor.dtype)
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Any) -> memoryview:
    assert sys.byteorder == "little", "digests are defined on little-endian bytes"
    if is_numpy(tensor):
        import numpy as np

        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    if tensor.is_cuda:
        tensor = _host_buffer(tensor).copy_(tensor)
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
