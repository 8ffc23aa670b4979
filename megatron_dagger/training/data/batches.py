"""The groups of rows of each optimizer step: a pure function of (seed, round, step), which makes a resume exact.

How a step's rows are divided among data-parallel ranks changes no loss, only how long ranks wait for each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_dagger.config import TrainingConfig
from megatron_dagger.training.data.packing import padded_length

EMPTY_ROW = -1  # fills up a step; has no label token and so no gradient


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The groups of rows of every optimizer step of a round.

    Each pass over the data has its own order. Passes follow each other without a gap: a batch may hold the end of
    one pass and the start of the next.
    """

    groups: int
    groups_per_step: int  # over all data-parallel ranks
    epochs: float
    max_steps: int | None
    seed: int
    round_index: int

    @property
    def steps(self) -> int:
        """The number of optimizer steps, at least 1."""
        steps = math.ceil(self._groups_in_all / self.groups_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def _groups_in_all(self) -> int:
        return max(1, round(self.groups * self.epochs))

    def groups_of(self, step: int) -> np.ndarray:
        """Return the indices of the groups of ``step``, at most (groups_per_step,) int64."""
        first = step * self.groups_per_step
        places = range(first, min(first + self.groups_per_step, self._groups_in_all))
        return np.array([self._group_at(place) for place in places], np.int64)

    def _group_at(self, place: int) -> int:
        epoch, index = divmod(place, self.groups)
        return int(_order(self.groups, self.seed, self.round_index, epoch)[index])


def fill_up(rows: np.ndarray, training: TrainingConfig) -> np.ndarray:
    """Return a step's rows and as many EMPTY_ROWs as let every data-parallel rank have equally many.

    Megatron's interleaved schedule also needs a multiple of the pipeline's stages for each rank.
    """
    parallel = training.parallel
    virtual = (parallel.virtual_pipeline_model_parallel_size or 1) > 1
    multiple = parallel.data_parallel_size * (parallel.pipeline_model_parallel_size if virtual else 1)
    missing = -len(rows) % multiple if len(rows) else multiple
    return np.concatenate([rows, np.full(missing, EMPTY_ROW, np.int64)])


def distribute_rows(rows: np.ndarray, costs: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Return each rank's rows: equally many, with sums of costs as even as a greedy rule makes them.

    ``costs`` has an entry per row of the dataset; an EMPTY_ROW costs nothing. The most expensive row goes first, to
    the rank with the smallest sum that still needs one (longest processing time first, Graham 1969). Each rank's
    rows keep that order, so rows that are computed at the same time cost about the same.
    """
    row_costs = np.where(rows >= 0, costs[rows], 0.0)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = np.zeros(ranks)
    for place in np.argsort(-row_costs, kind="stable"):
        open_ranks = [rank for rank in range(ranks) if len(shares[rank]) < len(rows) // ranks]
        chosen = min(open_ranks, key=lambda rank: loads[rank])
        shares[chosen].append(int(rows[place]))
        loads[chosen] += row_costs[place]
    return [np.array(share) for share in shares]


def row_lengths(tokens: np.ndarray, training: TrainingConfig) -> list[int]:
    """Return the padded lengths of a rank's rows of ``tokens`` tokens each, as short as the layout allows.

    Pipeline stages exchange tensors of one shape, so with a pipeline all rows get the length of the longest.
    """
    lengths = [padded_length(int(count), training.row_multiple, training.sequence_length) for count in tokens]
    one_shape = training.parallel.pipeline_model_parallel_size > 1
    return [max(lengths)] * len(lengths) if one_shape else lengths


@lru_cache(maxsize=4)
def _order(groups: int, seed: int, round_index: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, round_index, epoch]).permutation(groups)
