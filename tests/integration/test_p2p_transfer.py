"""Weights from real Megatron ranks into a running vLLM, through shared memory and point to point."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.p2p import free_address
from tests.integration.served import END, PP2, TIED, TOLERANCE, TP2, UNTIED, Written, write


def trainer_sources(directory, model, parallel, deadline_s=120.0):
    """Return a source of each kind from a trainer: shared memory, then point to point."""
    settings = {"layout": SourceLayout.of_trainer(model, parallel), "bucket_mib": 1, "deadline_s": deadline_s}
    return [
        WeightSource(kind="shared_memory", address=str(directory), **settings),
        WeightSource(kind="p2p", address=free_address(), **settings),
    ]


@pytest.mark.parametrize(
    ("model", "parallel", "workers"),
    [(TIED, PP2, 1), pytest.param(UNTIED, TP2, 2, marks=pytest.mark.slow)],
    ids=["tied-pp2-to-1", "untied-tp2-to-2"],
)
def test_weights_of_running_trainer_ranks_are_served(model, parallel, workers, tmp_path):
    directory = tmp_path / "it"
    sources = trainer_sources(tmp_path, model, parallel)
    target = TargetLayout(tensor_parallel_size=workers)
    engine = VllmEngineConfig(max_model_len=512, kv_cache_memory_mib=32, tensor_parallel_size=workers)
    output = Written(directory, model)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(write, directory, model, parallel, 1, sources, target)
        while not (directory / "digests-0.json").exists() and not training.done():
            time.sleep(0.05)
        with VllmStudent(directory, model, engine, seed=1, decode=str, end_of_turn=END) as student:
            # The first source starts the engine, through the loader; the second replaces the weights in place.
            for version, source in enumerate(sources):
                report = student.sync(source, version, output.digests())
                assert report.weight_version == version
                assert np.abs(student.logprobs(output.tokens) - output.logprobs()).max() < TOLERANCE
            training.result()
            finished = replace(sources[0], deadline_s=1.0)
            with pytest.raises(WeightSyncError, match=r"source rank 0 cannot be reached.*it still serves version 1"):
                student.sync(finished, 2, output.digests())
            assert np.abs(student.logprobs(output.tokens) - output.logprobs()).max() < TOLERANCE
