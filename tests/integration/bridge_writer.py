"""A rank of a small training that writes the files of the weight-sync tests (``python -m``, from ``launch``).

For each version: a checkpoint after two optimizer steps, the digests of the weights in memory, and Megatron's own
log-probs of ``tokens.npy``. Then the last version is sent to every source in the job.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_dagger.config import ModelConfig, TrainingConfig, build
from megatron_dagger.training import checkpoint, digests, weight_export
from megatron_dagger.training.data import packing
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.ranks.process_groups import is_rank_zero, process_groups
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import WeightSource


def main(directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    model, training = build(ModelConfig, job["model"]), build(TrainingConfig, job["training"])
    tokens = np.load(directory / "tokens.npy")
    episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=1, tokens=tokens[1:]),))
    row = packing.pack([episode], training.sequence_length).row(0)
    with process_groups(training.parallel, seed=1, timeout_s=120, threads=1) as device:
        for version in range(job["versions"]):
            engine = MegatronEngine(model, training, seed=version, device=device)
            for _ in range(2):
                engine.step([row], normaliser=float(len(tokens) - 1), learning_rate=5e-3)
            state = checkpoint.CheckpointState(
                step=2,
                round_index=version,
                seed=version,
                weight_version=version,
                fingerprint="test",
                model=model,
                megatron_core="",
            )
            checkpoint.save(directory / f"checkpoint-{version}", engine.chunks, engine.optimizer, state)
            scales = digests.block_scales(engine.chunks, model, device) if job["quantization"] == "fp8" else None
            in_memory = digests.parameter_digests(engine.chunks, model, scales)
            logprobs = engine.logprobs([row])
            if logprobs is not None:  # on the ranks of the last stage, which have the same values
                np.save(directory / f"logprobs-{version}.npy", logprobs[0][: len(tokens) - 1])
            if is_rank_zero():
                (directory / f"digests-{version}.json").write_text(json.dumps(in_memory))
        for source in job["sources"]:
            target = build(TargetLayout, job["target"])
            weight_export.send_to_engine(engine, build(WeightSource, source), target, job["dtype"], job["quantization"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
