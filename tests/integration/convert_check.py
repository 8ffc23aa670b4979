"""Megatron-Core's part of the conversion tests (``python -m``, DIRECTORY...): it loads converted checkpoints.

The trainer's engine loads each model, writes its log-probs of ``tokens.npy`` to ``logprobs.npy``, and sends the weights
to the sources in ``sources.json`` if it exists.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_dagger.config import TrainingConfig, build
from megatron_dagger.training import weight_export
from megatron_dagger.training.data import packing
from megatron_dagger.training.engine import MegatronEngine
from megatron_dagger.training.ranks.process_groups import process_groups
from megatron_dagger.types import LabelledEpisode, StateLabel
from megatron_dagger.weights.checkpoints import open_checkpoint
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import WeightSource


def main(directories: list[Path]) -> None:
    training = TrainingConfig(sequence_length=320, global_batch_tokens=320)
    with process_groups(training.parallel, seed=1, timeout_s=120, threads=1) as device:
        for directory in directories:
            model = open_checkpoint(directory / "hf").model
            engine = MegatronEngine(model, training, seed=1, device=device)
            engine.load(directory / "megatron", with_optimizer=False)
            tokens = np.load(directory / "tokens.npy")
            episode = LabelledEpisode(tokens=tokens, labels=(StateLabel(position=1, tokens=tokens[1:]),))
            row = packing.pack([episode], training.sequence_length).row(0)
            (logprobs,) = engine.logprobs([row]) or [None]
            assert logprobs is not None
            np.save(directory / "logprobs.npy", logprobs[: len(tokens) - 1])
            if (directory / "sources.json").exists():
                for source in json.loads((directory / "sources.json").read_text()):
                    weight_export.send_to_engine(engine, build(WeightSource, source), TargetLayout(), "float32")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
