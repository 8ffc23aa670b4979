"""Which rows make up which step: a pure function of (seed, round, step), so a resume is exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

EMPTY_ROW = -1  # fills up the last batch: no label token, so no gradient


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The rows of every optimizer step of a round.

    Each pass over the data has its own order; passes follow each other without a gap, so a
    batch may hold the end of one and the start of the next.
    """

    rows: int
    rows_per_step: int  # over all data-parallel ranks
    epochs: float
    max_steps: int | None
    seed: int
    round_index: int

    @property
    def steps(self) -> int:
        steps = math.ceil(max(1, round(self.rows * self.epochs)) / self.rows_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def rows_of(self, step: int) -> np.ndarray:
        """(rows_per_step,) row indices of ``step``, EMPTY_ROW where the round's data have ended."""
        end = max(1, round(self.rows * self.epochs))
        chosen = np.full(self.rows_per_step, EMPTY_ROW, np.int64)
        for place in range(self.rows_per_step):
            at = step * self.rows_per_step + place
            if at < end:
                epoch, index = divmod(at, self.rows)
                chosen[place] = _order(self.rows, self.seed, self.round_index, epoch)[index]
        return chosen

    def rows_of_rank(self, step: int, rank: int, data_parallel_size: int) -> np.ndarray:
        """The rows of one data-parallel rank, one a micro-batch."""
        return self.rows_of(step)[rank::data_parallel_size]


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, round_index: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, round_index, epoch]).permutation(rows)
