"""TrainJob: everything that a round's training depends on, except the episodes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_dagger.config import ModelConfig, TrainingConfig, build, to_dict

MANIFEST = "manifest.json"  # in the output directory; written last


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One round of training. Writes checkpoint/, metrics.jsonl and, last, manifest.json to ``output_dir``."""

    round_index: int
    seed: int
    model: ModelConfig
    training: TrainingConfig
    output_dir: str
    init_checkpoint: str | None = None  # the previous round's; in round 0 any weights; None: random weights
    weight_version: int = 0  # of the weights that this round produces
    quantization: Literal["none", "fp8"] = "none"  # how rollout engines hold the weights; digests are of that form

    def __post_init__(self) -> None:
        self.training.parallel.check_model(self.model)

    def save(self, path: Path) -> None:
        """Write the job to ``path`` as JSON."""
        path.write_text(json.dumps(to_dict(self), indent=1))

    @staticmethod
    def load(path: Path) -> TrainJob:
        """Return the job that ``save`` wrote; raises ConfigError for unknown or wrong fields."""
        return build(TrainJob, json.loads(path.read_text()))
