"""Models written by Megatron and served by vLLM, for the tests of weight sync and sampling."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_dagger.config import (
    ModelConfig,
    ParallelConfig,
    SamplingConfig,
    TrainingConfig,
    VllmEngineConfig,
    YarnConfig,
    to_dict,
)
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.training.ranks.launch import launch
from megatron_dagger.types import Action, State
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import WeightSource

ROOT = Path(__file__).resolve().parents[2]
TIED = ModelConfig(num_layers=2, vocab_size=1000, init_std=0.2)  # large weights: log-probs are far from uniform
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=64)  # the tests' sequence is five times as long
UNTIED = replace(TIED, tie_embeddings=False, max_position_embeddings=512, yarn=YARN)
TP2 = ParallelConfig(world_size=2, tensor_model_parallel_size=2)
PP2 = ParallelConfig(world_size=2, pipeline_model_parallel_size=2)
ONE = ParallelConfig()
ONE_WORKER = TargetLayout()
END = 7
TOLERANCE = 1e-3  # of log-probs in fp32


@dataclass(frozen=True)
class Written:
    """The files that ``bridge_writer`` wrote for a model and layout."""

    directory: Path
    model: ModelConfig

    def checkpoint(self, version: int = 0) -> Path:
        return self.directory / f"checkpoint-{version}"

    def digests(self, version: int = 0) -> dict[str, str]:
        return json.loads((self.directory / f"digests-{version}.json").read_text())

    def logprobs(self, version: int = 0) -> np.ndarray:
        return np.load(self.directory / f"logprobs-{version}.npy")

    @property
    def tokens(self) -> np.ndarray:
        return np.load(self.directory / "tokens.npy")


def write(
    directory: Path,
    model: ModelConfig,
    parallel: ParallelConfig,
    versions: int,
    sources: Sequence[WeightSource] = (),
    target: TargetLayout = ONE_WORKER,
    engine: VllmEngineConfig = VllmEngineConfig(),  # noqa: B008 - frozen
) -> Written:
    """Train ``versions`` versions of a model with Megatron, and send the last to ``sources``; return the files."""
    directory.mkdir()
    precision = "fp32" if engine.dtype == "float32" else "bf16"
    training = TrainingConfig(parallel=parallel, sequence_length=320, global_batch_tokens=320, precision=precision)
    job = {"model": to_dict(model), "training": to_dict(training), "versions": versions}
    job |= {
        "sources": [to_dict(source) for source in sources],
        "target": to_dict(target),
        "dtype": engine.dtype,
        "quantization": engine.quantization,
    }
    (directory / "job.json").write_text(json.dumps(job))
    (directory / "config.json").write_text(json.dumps(model.hf_config()))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 300).astype(np.int32)
    np.save(directory / "tokens.npy", tokens)
    arguments = ["tests.integration.bridge_writer", str(directory)]
    launch(arguments, parallel, directory / "logs", 300, env={"PYTHONPATH": str(ROOT)})
    return Written(directory, model)


def start(output: Written, workers: int = 1) -> VllmStudent:
    """Start an engine in the background, with dummy weights."""
    engine = VllmEngineConfig(
        max_model_len=512, kv_cache_memory_mib=32, start_deadline_s=300, tensor_parallel_size=workers
    )
    student = VllmStudent(output.directory, output.model, engine, seed=1, decode=str, end_of_turn=END)
    student.start()
    return student


def state(seed: int, length: int = 40) -> State:
    tokens = np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)
    return State(messages=(), tokens=tokens, seed=seed)


def sample(student: VllmStudent, prompt: State, **sampling) -> Action:
    """Sample one turn with these sampling parameters."""
    return asyncio.run(student.with_sampling(SamplingConfig(**sampling)).act(prompt))
