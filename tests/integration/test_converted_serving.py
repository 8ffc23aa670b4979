"""Converted checkpoints served by vLLM: a model with experts, and real weights through every transport."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

import torch
import transformers

from megatron_dagger.config import ParallelConfig, VllmEngineConfig, to_dict
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.weights.checkpoints import open_checkpoint
from megatron_dagger.weights.verify.digest import canonical_digests
from tests.integration.converted import converted, run_megatron, transformers_logprobs
from tests.integration.served import END, TOLERANCE
from tests.integration.test_p2p_transfer import trainer_sources
from tests.unit.weights.sample_models import sample_model

ENGINE = VllmEngineConfig(max_model_len=512, kv_cache_memory_mib=64)


def student_of(directory: Path) -> tuple[VllmStudent, dict[str, str]]:
    """Return a student for the model in ``directory``/hf, and the digests of its weights."""
    source = open_checkpoint(directory / "hf")
    student = VllmStudent(directory / "hf", source.model, ENGINE, seed=1, decode=str, end_of_turn=END)
    return student, canonical_digests(source.canonical_tensors(), source.model)


def difference(student: VllmStudent, directory: Path) -> float:
    served = student.logprobs(np.load(directory / "tokens.npy"))
    return float(np.abs(served - transformers_logprobs(directory)).max())


def test_experts_are_served_from_a_converted_checkpoint(tmp_path):
    model = sample_model(
        "qwen3_moe",
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=32,
        hidden_size=64,
        moe_ffn_hidden_size=32,
        moe_router_topk=2,
        vocab_size=300,
        tie_embeddings=False,
    )
    torch.manual_seed(1)
    reference = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**model.hf_config()))
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    reference.save_pretrained(tmp_path / "hf")
    converted("hf-to-megatron", tmp_path / "hf", tmp_path / "megatron", "--tensor-parallel", 2)
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 300, 200).astype(np.int32))
    student, digests = student_of(tmp_path)
    with student:
        for version in range(2):  # the first starts the engine, the second replaces the weights in place
            student.sync(tmp_path / "megatron", version, digests)
            assert difference(student, tmp_path) < TOLERANCE


@pytest.mark.slow
def test_real_weights_are_served_through_every_transport(smollm2, tmp_path):
    student, digests = student_of(smollm2)
    sources = trainer_sources(tmp_path, student.model, ParallelConfig())
    (smollm2 / "sources.json").write_text(json.dumps([to_dict(source) for source in sources]))
    try:
        with ThreadPoolExecutor(1) as pool, student:
            training = pool.submit(run_megatron, smollm2)
            for version, weights in enumerate([smollm2 / "megatron", *sources]):
                report = student.sync(weights, version, digests)
                assert report.tensors == 272
                assert difference(student, smollm2) < TOLERANCE
            training.result()
    finally:
        (smollm2 / "sources.json").unlink()
