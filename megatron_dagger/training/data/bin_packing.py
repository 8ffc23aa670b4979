"""Packing items of given lengths into as few bins of one capacity as possible; deterministic."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_MAX_CANDIDATES = 128  # items that are considered for one bin
_SLACKS = (0.02, 0.06)  # shares of a bin that may stay empty


def pack_bins(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Return bins of item indices, by ``best_fit_decreasing`` or, if that needs fewer bins, by ``subset_sum_fit``."""
    bins = best_fit_decreasing(lengths, capacity)
    if (len(bins) - 1) * capacity < sum(lengths):
        return bins  # no packing needs fewer
    return min(bins, *(subset_sum_fit(lengths, capacity, int(capacity * slack)) for slack in _SLACKS), key=len)


def subset_sum_fit(lengths: Sequence[int], capacity: int, slack: int) -> list[tuple[int, ...]]:
    """Return bins of item indices: the longest unpacked item, then a subset of the rest that fills the bin.

    At most ``slack`` of the bin stays free where the items allow it. The subset prefers long items, so short ones
    remain for the bins that need them.
    """
    unpacked = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[tuple[int, ...]] = []
    while unpacked:
        longest = unpacked.pop(0)
        free = capacity - lengths[longest]
        fitting = unpacked[bisect.bisect_left(unpacked, -free, key=lambda i: -lengths[i]) :]
        candidates = fitting[:: -(-len(fitting) // _MAX_CANDIDATES) or 1]
        chosen = _subset([lengths[i] for i in candidates], free, free - slack)
        packed = {candidates[i] for i in chosen}
        unpacked = [i for i in unpacked if i not in packed]
        bins.append((longest, *(candidates[i] for i in chosen)))
    return bins


def _subset(sizes: Sequence[int], limit: int, enough: int) -> list[int]:
    """Return indices of ``sizes`` whose sum is as large as possible, at most ``limit``.

    Only as many of the first sizes are considered as it takes to reach ``enough``.
    """
    sums = [1]  # bit n of sums[k]: some of the first k sizes add up to n
    for size in sizes:
        if sums[-1] >> max(enough, 0):
            break
        sums.append((sums[-1] | sums[-1] << size) & ((2 << limit) - 1))
    total, chosen = sums[-1].bit_length() - 1, []
    for i in reversed(range(len(sums) - 1)):
        if not sums[i] >> total & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen[::-1]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Return bins of item indices: longest item first, each into the fullest bin that it fits into.

    O(n log n) comparisons. At most 11/9 of the optimal number of bins, plus a constant (Johnson, 1973).
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (free places, bin), ascending
    for item in order:
        at = bisect.bisect_left(open_bins, (lengths[item], -1))
        if at < len(open_bins):
            free, chosen = open_bins.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if free > lengths[item]:
            bisect.insort(open_bins, (free - lengths[item], chosen))
    return [tuple(items) for items in bins]
