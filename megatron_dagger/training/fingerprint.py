"""A hash of everything that a round's losses depend on. A round resumes only from a checkpoint with the same hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from megatron_dagger.config import to_dict
from megatron_dagger.training.data.packing import PackedDataset
from megatron_dagger.training.job import TrainJob

# Settings that change no loss: a resume may change them.
_NEUTRAL = (
    "parallel",
    "checkpoint_interval",
    "threads_per_process",
    "deadline_s",
    "collective_timeout_s",
    "recompute",
    "recompute_modules",
)


def fingerprint(job: TrainJob, data: PackedDataset) -> str:
    """Return a hash (hex SHA-256) of the job's data and settings, without those that change no loss."""
    hasher = hashlib.sha256()
    neutral = replace(job, output_dir="", weight_version=0, quantization="none")
    if job.round_index:  # it continues from the previous round's checkpoint, however the run directory is spelled
        neutral = replace(neutral, init_checkpoint=None)
    settings = to_dict(neutral)
    for name in _NEUTRAL:
        del settings["training"][name]
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    for sample in data.samples:
        hasher.update(f"{len(sample.trunk)} {sample.spans}".encode() + sample.trunk.tobytes())
        for branch in sample.branches:
            hasher.update(f"{branch.position} {len(branch.tokens)} {branch.weight}".encode() + branch.tokens.tobytes())
    return hasher.hexdigest()
