"""Packing items of given lengths into bins of one capacity: as few bins as can be, always the same ones."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_CANDIDATES = 128  # at most, for one bin
_SLACKS = (0.02, 0.06)  # of a bin


def pack_bins(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Pack items into bins: by ``best_fit_decreasing``, or by ``subset_sum_fit`` where that needs fewer bins."""
    bins = best_fit_decreasing(lengths, capacity)
    if (len(bins) - 1) * capacity < sum(lengths):
        return bins  # no packing needs fewer
    return min(bins, *(subset_sum_fit(lengths, capacity, int(capacity * slack)) for slack in _SLACKS), key=len)


def subset_sum_fit(lengths: Sequence[int], capacity: int, slack: int) -> list[tuple[int, ...]]:
    """Pack items into bins: the longest one left, and then others that fill up its bin but for ``slack``.

    These are as long as can be, so that short items are left for the bins that need them. Deterministic.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[tuple[int, ...]] = []
    while left:
        longest = left.pop(0)
        room = capacity - lengths[longest]
        fitting = left[bisect.bisect_left(left, -room, key=lambda i: -lengths[i]) :]
        candidates = fitting[:: -(-len(fitting) // _CANDIDATES) or 1]
        chosen = _subset([lengths[i] for i in candidates], room, room - slack)
        taken = {candidates[i] for i in chosen}
        left = [i for i in left if i not in taken]
        bins.append((longest, *(candidates[i] for i in chosen)))
    return bins


def _subset(sizes: Sequence[int], room: int, enough: int) -> list[int]:
    """Which of ``sizes`` sum up to at least ``enough``, else to as much as can be, but at most ``room``.

    Of the first sizes that can.
    """
    sums = [1]  # bit n: some of the sizes so far have the sum n
    for size in sizes:
        if sums[-1] >> max(enough, 0):
            break
        sums.append((sums[-1] | sums[-1] << size) & ((2 << room) - 1))
    total, chosen = sums[-1].bit_length() - 1, []
    for i in reversed(range(len(sums) - 1)):
        if not sums[i] >> total & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen[::-1]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Pack items into bins: longest first, each into the fullest bin that has room for it.

    Deterministic, O(n log n) comparisons. At most 11/9 of the best number of bins, plus one.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, bin), ascending
    for item in order:
        at = bisect.bisect_left(room, (lengths[item], -1))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(item)
        if free > lengths[item]:
            bisect.insort(room, (free - lengths[item], chosen))
    return [tuple(items) for items in bins]
