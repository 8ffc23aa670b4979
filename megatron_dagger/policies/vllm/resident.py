"""The student next to a resident trainer: it takes weights from the trainer's memory where it can."""

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
    """A VllmStudent whose ``sync`` requests the weights from the run's trainer, and falls back to the checkpoint.

    Creating it starts the engine in the background, with dummy weights: the first ``sync`` replaces them.
    """

    def __init__(self, student: VllmStudent, run_dir: Path):
        self._student, self._run_dir = student, run_dir
        student.start()

    def with_sampling(self, sampling: SamplingConfig) -> SampledStudent:
        """Return a policy that samples with these parameters from the weights that are served."""
        return self._student.with_sampling(sampling)

    def sync(self, weights: Path, version: int, digests: Mapping[str, str], canary: Canary | None = None) -> SyncReport:
        """Serve ``version``, as VllmStudent.sync does; ``weights`` is its checkpoint."""
        if not self._student.serves(version, digests):
            try:
                return self._student.sync(request_weights(self._run_dir, version), version, digests, canary)
            except WeightSyncError as error:
                logger.warning("weights %d come from the checkpoint: %s", version, error)
        return self._student.sync(weights, version, digests, canary)
