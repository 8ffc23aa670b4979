"""The student beside a trainer that lives: it takes weights from the trainer's memory where it can."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from megatron_dagger.config import SamplingConfig
from megatron_dagger.policies.vllm.student import SampledStudent, SyncReport, VllmStudent
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.verify.canary import Canary
from megatron_dagger.weights.weight_server import request_weights

logger = logging.getLogger(__name__)


class ResidentStudent:
    """A VllmStudent whose ``sync`` asks the run's trainer first, and then reads the checkpoint.

    Its engine starts at once, in the background: dummy weights serve, since all come later.
    """

    def __init__(self, student: VllmStudent, run_dir: Path):
        self._student, self._run_dir = student, run_dir
        student.begin()

    def with_sampling(self, sampling: SamplingConfig) -> SampledStudent:
        """The policy that samples so, from the weights served last."""
        return self._student.with_sampling(sampling)

    def sync(self, weights: Path, version: int, digests: Mapping[str, str], canary: Canary | None = None) -> SyncReport:
        """As VllmStudent.sync; ``weights`` is the checkpoint of the version."""
        if not self._student.serves(version, digests):
            try:
                return self._student.sync(request_weights(self._run_dir, version), version, digests, canary)
            except WeightSyncError as error:
                logger.warning("weights %d come from the checkpoint: %s", version, error)
        return self._student.sync(weights, version, digests, canary)
