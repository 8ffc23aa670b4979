"""The data of a round: episodes are read and packed before, or while, the model is built."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dagger.training.data.packing import PackedDataset, pack
from megatron_dagger.training.job import TrainJob
from megatron_dagger.types import LabelledEpisode

ReadEpisodes = Callable[[], Sequence[LabelledEpisode]]


class NoTrainingDataError(ValueError):
    """The episodes have no label to train on."""


@dataclass(frozen=True, kw_only=True)
class RoundData:
    """A round's packed episodes. ``began_s`` is when loading began (monotonic clock), ``load_s`` how long it took."""

    packed: PackedDataset
    episodes: int
    began_s: float
    load_s: float


def load_round_data(job: TrainJob, read_episodes: ReadEpisodes) -> RoundData:
    """Read and pack the episodes of ``job``. Raises NoTrainingDataError if no label fits."""
    began_s = time.monotonic()
    episodes = read_episodes()
    packed = pack(episodes, job.training.sequence_length, packing=job.training.packing)
    if not packed.label_tokens:
        raise NoTrainingDataError(
            f"round {job.round_index}: none of {len(episodes)} episodes has a label within "
            f"training.sequence_length={job.training.sequence_length} tokens; raise it, or collect more episodes"
        )
    return RoundData(packed=packed, episodes=len(episodes), began_s=began_s, load_s=time.monotonic() - began_s)
