"""Which rows make up which step: a pure function of (seed, round, step), so a resume is exact.

How a step's rows are shared out among data-parallel ranks changes no loss, only who waits for whom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_dagger.config import TrainingConfig
from megatron_dagger.training.data.packing import padded_length

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


def share_out(rows: np.ndarray, costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The rows of each rank, as many for each and the sums of their costs as even as can be.

    ``costs`` (all rows,); an EMPTY_ROW costs nothing. The costliest row goes first, to the rank with the
    least so far that wants one (longest processing time first, Graham 1969), and a rank's rows come in that
    order: what ranks do at the same time costs about the same.
    """
    price = np.where(rows >= 0, costs[rows], 0.0)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks)
    for place in np.argsort(-price, kind="stable"):
        open_ranks = [rank for rank in range(ranks) if len(shares[rank]) < len(rows) // ranks]
        chosen = min(open_ranks, key=lambda rank: loads[rank])
        shares[chosen].append(int(rows[place]))
        loads[chosen] += price[place]
    return [np.array(share) for share in shares]


def row_lengths(tokens: np.ndarray, training: TrainingConfig) -> list[int]:
    """How long a rank's rows of so many tokens are made: no longer than need be.

    Pipeline stages hand over tensors of one shape, so with a pipeline all are as long as the longest.
    """
    lengths = [padded_length(int(count), training.row_multiple, training.sequence_length) for count in tokens]
    one_shape = training.parallel.pipeline_model_parallel_size > 1
    return [max(lengths)] * len(lengths) if one_shape else lengths


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, round_index: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, round_index, epoch]).permutation(rows)
