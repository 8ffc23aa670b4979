"""The check serve-* of tools.check.gpu: vLLM serves what the trainer wrote, and takes the next weights in place.

Two rounds are trained in BF16 or FP8. An engine, on a GPU with CUDA graphs, loads the first round's checkpoint,
samples, and then loads the second's. Both times every tensor's digest and the canary's log-probs are compared, as in
every run.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import SamplingConfig, VllmEngineConfig, build
from megatron_dagger.store.atomic import read_json
from megatron_dagger.training.job import MANIFEST, TrainJob
from megatron_dagger.types import State
from megatron_dagger.weights.verify.canary import Canary
from tools.check.gpu_cases import Sizes, Variant
from tools.support import labelled_episodes

SAMPLED = 16  # tokens of a turn


def check(folder: Path, variant: Variant, sizes: Sizes) -> dict[str, Any]:
    """Return the seconds of both loads and the share of tokens that were the same with both rounds' weights."""
    import torch

    from megatron_dagger.policies.vllm.student import VllmStudent
    from megatron_dagger.training.trainer import train_round

    cuda, model = torch.cuda.is_available(), sizes.small
    folder = folder / f"serve-{variant.precision}"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.hf_config()))
    episodes = labelled_episodes.make(64, seed=3, vocab_size=model.vocab_size, longest=sizes.small_tokens)
    training = replace(variant.settings(sizes.small_training(), cuda=cuda), max_steps=sizes.steps)
    for index in (0, 1):
        job = TrainJob(
            round_index=index,
            seed=11,
            model=model,
            training=training,
            output_dir=str(folder / str(index)),
            init_checkpoint=str(folder / "0" / "checkpoint") if index else None,
            weight_version=index,
        )
        train_round(job, lambda: episodes)
    engine = VllmEngineConfig(
        dtype="bfloat16" if variant.precision != "fp32" else "float32",
        max_model_len=sizes.small_tokens,
        kv_cache_memory_mib=None if cuda else 64,
        gpu_memory_utilization=0.3,  # the trainer's memory is not all given back
        enforce_eager=not cuda,
    )
    prompt = np.arange(32, dtype=np.int32) % model.vocab_size
    seconds, turns = [], []
    with VllmStudent(folder, model, engine, seed=1, decode=lambda ids: "", end_of_turn=0) as student:
        for index in (0, 1):
            began = time.monotonic()
            _load(student, folder / str(index), index)
            seconds.append(time.monotonic() - began)
            turns.append(_sample(student, prompt))
    same = float(np.mean([a == b for a, b in zip(*turns, strict=False)]))
    return {"first_load_s": seconds[0], "load_in_place_s": seconds[1], "same_tokens": same}


def _load(student: Any, directory: Path, version: int) -> None:
    """Load a round's weights. Raises WeightSyncError if a digest or the canary's log-probs differ."""
    manifest = read_json(directory / MANIFEST)
    canary = build(Canary, manifest["canary"])
    student.sync(directory / manifest["checkpoint"], version, manifest["digests"], canary)


def _sample(student: Any, prompt: np.ndarray) -> list[int]:
    state = State(messages=(), tokens=prompt, seed=1)
    sampling = SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=SAMPLED)
    return [int(token) for token in asyncio.run(student.sample(state, sampling)).tokens]
