"""Digests of weights in canonical space, that ranks of any layout compute from their own shares.

The digest of a canonical tensor is the sum, modulo 2^64, of the xxh3-64 hashes of its tiles' bytes
(contiguous, little-endian), each seeded with the tile's number; written with dtype and shape. So a
wrong value, a wrong cast, and a block in the wrong place all show, and shares are put together by
adding. It finds mistakes and damage; it is no protection against somebody who wants two tensors alike.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import xxhash

from megatron_dagger.config.model import ModelConfig
from megatron_dagger.weights.blocks import Block, Box
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.verify.hash_tiles import Tiles, hash_tiles

_MODULUS = 2**64
_PORTION_BYTES = 64 << 20  # that are fetched from a GPU at once

# dtype, and by run of tiles (first, past the last) the sum of their hashes
Share = tuple[str, dict[tuple[int, int], int]]
Shares = dict[str, Share]  # by canonical name


def digest_shares(blocks: Sequence[Block], tensor: Any, model: ModelConfig) -> Shares:
    """What a rank's own tensor, made up of ``blocks``, contributes to the digests of canonical tensors.

    ``tensor``: torch or numpy, any dtype, any device. A leading dimension of experts is taken apart.
    """
    table = hash_tiles(model)
    shares: Shares = {}
    tensor = tensor if _is_numpy(tensor) else tensor.detach()
    for block in blocks:
        for single, values in _each_expert(block, tensor):
            cut = table[single.name]
            run = cut.within(single)
            _, sums = shares.setdefault(single.name, (_dtype(values), {}))
            sums[run.start, run.stop] = _sum_of_hashes(values, cut, run)
    return shares


def canonical_digests(tensors: Iterable[tuple[str, Any]], model: ModelConfig) -> dict[str, str]:
    """The digests of whole canonical tensors; a name that comes twice is a ValueError."""
    return merge([digest_whole(tensors, model)], model)


def digest_whole(tensors: Iterable[tuple[str, Any]], model: ModelConfig) -> Shares:
    """The shares of a rank that holds these canonical tensors whole."""
    found: Shares = {}
    for name, tensor in tensors:
        if name in found:
            raise ValueError(f"tensor {name!r} comes twice")
        whole = Box((0,) * len(tensor.shape), tuple(tensor.shape))
        found |= digest_shares([Block(name, whole, whole.start)], tensor, model)
    return found


def merge(ranks: Sequence[Mapping[str, Share]], model: ModelConfig) -> dict[str, str]:
    """The digests of the tensors that the ranks hold together, in the model's order.

    What several ranks hold must be the same on all of them, and every tensor must be held as a whole or
    not at all; else WeightMapError with the tensor and the rank.
    """
    held: dict[str, tuple[str, dict[tuple[int, int], tuple[int, int]]]] = {}
    for rank, shares in enumerate(ranks):
        for name, (dtype, sums) in shares.items():
            first_dtype, runs = held.setdefault(name, (dtype, {}))
            if dtype != first_dtype:
                raise WeightMapError(f"tensor {name!r} is {first_dtype} on one rank and {dtype} on rank {rank}")
            for run, value in sums.items():
                other, known = runs.setdefault(run, (rank, value))
                if known != value:
                    raise WeightMapError(f"ranks {other} and {rank} hold different copies of tensor {name!r}")
    digests = {}
    for name, cut in hash_tiles(model).items():
        if name in held:
            dtype, runs = held[name]
            _check_whole(name, sorted(runs), cut)
            digests[name] = f"{dtype} {cut.shape} {sum(value for _, value in runs.values()) % _MODULUS:016x}"
    return digests


def compare(expected: Mapping[str, str], received: Mapping[str, str]) -> str | None:
    """What differs between two sets of digests, in words that name the tensor; None if nothing does."""
    for name in expected:
        if name not in received:
            return f"tensor {name!r} was not received"
        if expected[name] != received[name]:
            return f"tensor {name!r} differs: sent {expected[name]}, received {received[name]}"
    extra = [name for name in received if name not in expected]
    return f"tensor {extra[0]!r} was received but never sent" if extra else None


def _check_whole(name: str, runs: list[tuple[int, int]], cut: Tiles) -> None:
    stops = [0, *(stop for _, stop in runs)]
    for stop, (start, _) in zip(stops, [*runs, (cut.count, 0)], strict=True):
        if start != stop:
            what = "no rank holds" if start > stop else "ranks hold overlapping shares with"
            raise WeightMapError(f"{what} tile {min(start, stop)} of the {cut.count} of tensor {name!r}")


def _each_expert(block: Block, tensor: Any) -> Iterable[tuple[Block, Any]]:
    start, box = block.start, block.canonical
    values = tensor[tuple(slice(s, s + n) for s, n in zip(start, box.shape, strict=True))]
    if "{}" not in block.name:
        yield block, values
        return
    for index in range(box.shape[0]):
        inner = Box(box.start[1:], box.shape[1:])
        yield Block(block.name.format(box.start[0] + index), inner, start[1:]), values[index]


def _sum_of_hashes(values: Any, cut: Tiles, run: range) -> int:
    pieces = _columns(values, cut.extent) if cut.axis == 1 else _rows(values, cut.extent)
    return sum(xxhash.xxh3_64_intdigest(piece, seed=tile) for tile, piece in zip(run, pieces, strict=True))


def _columns(values: Any, extent: int) -> Iterator[memoryview]:
    """The bytes of so many columns at a time, which divide them; all pieces in the same memory."""
    piece = _here(values[:, :extent])
    for at in range(0, values.shape[1], extent):
        piece[...] = values[:, at : at + extent]
        yield _bytes(piece)


def _rows(values: Any, extent: int) -> Iterator[memoryview]:
    """The bytes of so many rows at a time; the last may be fewer."""
    size = extent * (values[:1].nbytes or 1)
    step = extent * max(1, _PORTION_BYTES // size)
    for at in range(0, values.shape[0], step):
        data = _bytes(values[at : at + step])
        yield from (data[start : start + size] for start in range(0, len(data), size))


def _here(tensor: Any) -> Any:
    """Memory like the tensor's: contiguous, this host's, and where it is to be filled from a GPU page-locked."""
    if _is_numpy(tensor):
        import numpy as np

        return np.empty(tensor.shape, tensor.dtype)
    import torch

    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)


def _is_numpy(tensor: Any) -> bool:
    return type(tensor).__module__.partition(".")[0] == "numpy"


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Any) -> memoryview:
    assert sys.byteorder == "little", "digests are defined on little-endian bytes"
    if _is_numpy(tensor):
        import numpy as np

        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    if tensor.is_cuda:
        tensor = _here(tensor).copy_(tensor)
    data: memoryview = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
