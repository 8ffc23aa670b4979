"""BF16 weights of real Megatron ranks, served by vLLM in block-wise FP8 through every transport."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

import transformers

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.verify.canary import Canary
from tests.integration import fp8_kernel
from tests.integration.converted import model_logprobs
from tests.integration.served import END, TIED, TP2, Written, write
from tests.integration.test_p2p_transfer import trainer_sources
from tests.unit.weights.fp8_tensors import quantised, without_scales

# Each of two ranks holds half of the blocks of every projection.
MODEL = replace(TIED, hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=32, ffn_hidden_size=256)
ENGINE = VllmEngineConfig(max_model_len=512, kv_cache_memory_mib=32, dtype="bfloat16", quantization="fp8")


def reference(output: Written) -> np.ndarray:
    """Return Transformers' log-probs with weights that were quantised, each canonical tensor whole, and dequantised."""
    stored = MegatronCheckpoint(output.checkpoint()).canonical_tensors(MODEL)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**MODEL.hf_config())).bfloat16().eval()
    model.load_state_dict(without_scales(quantised(MODEL, stored)), strict=False)
    model.tie_weights()
    return model_logprobs(model, output.tokens)


def test_a_trainers_weights_are_served_in_fp8_through_every_transport(tmp_path):
    fp8_kernel.register()
    sources = trainer_sources(tmp_path, MODEL, TP2)
    output = Written(tmp_path / "it", MODEL)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(write, output.directory, MODEL, TP2, 1, sources, engine=ENGINE)
        while not (output.directory / "digests-0.json").exists() and not training.done():
            time.sleep(0.05)
        with VllmStudent(output.directory, MODEL, ENGINE, seed=1, decode=str, end_of_turn=END) as student:
            student.sync(output.checkpoint(), 0, output.digests())
            expected = reference(output)

            def check_logprobs() -> None:
                """Assert that they differ by BF16 rounding only, and far less than quantisation changes them."""
                difference = np.abs(student.logprobs(output.tokens) - expected)
                assert difference.max() < 0.3
                assert difference.mean() < 0.25 * np.abs(output.logprobs() - expected).mean()

            check_logprobs()
            for version, source in enumerate(sources, 1):
                report = student.sync(source, version, output.digests())
                assert report.tensors == len(output.digests())
                check_logprobs()
            training.result()
            # The canary accepts quantised weights, which are close to the trainer's, and rejects other weights.
            tokens, logprobs = output.tokens[:64], output.logprobs()[:63]
            canary = Canary(tokens=tuple(tokens.tolist()), logprobs=tuple(logprobs.tolist()))
            student.sync(output.checkpoint(), 3, output.digests(), canary)
            wrong_canary = replace(canary, logprobs=tuple((logprobs[::-1]).tolist()))
            with pytest.raises(WeightSyncError, match="log-probs of the canary"):
                student.sync(output.checkpoint(), 4, output.digests(), wrong_canary)
    assert any("float8_e4m3fn" in digest for digest in output.digests().values())
