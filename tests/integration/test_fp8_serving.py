"""BF16 weights of real Megatron ranks, served by the real vLLM in block-wise FP8, over every transport."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

import torch
import transformers

from megatron_dagger.config import VllmEngineConfig
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.verify.canary import Canary
from tests.integration import fp8_kernel
from tests.integration.served import END, TIED, TP2, Written, write
from tests.integration.test_live_transfer import offers
from tests.unit.weights.fp8_tensors import quantised, taken_back

# With two ranks, each has half of the blocks of every projection.
MODEL = replace(TIED, hidden_size=128, num_attention_heads=4, num_query_groups=4, kv_channels=32, ffn_hidden_size=256)
ENGINE = VllmEngineConfig(max_model_len=512, kv_cache_memory_mib=32, dtype="bfloat16", quantization="fp8")


def reference(where: Written) -> np.ndarray:
    """Transformers' log-probs with weights that were quantised, each canonical tensor whole, and taken back."""
    stored = MegatronCheckpoint(where.checkpoint()).canonical_tensors(MODEL)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**MODEL.hf_config())).bfloat16().eval()
    model.load_state_dict(taken_back(quantised(MODEL, stored)), strict=False)
    model.tie_weights()
    tokens = torch.from_numpy(where.tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()


def test_a_trainers_weights_are_served_in_fp8_over_every_transport(tmp_path):
    fp8_kernel.register()
    offered = offers(tmp_path, MODEL, TP2, ["host", "live"])
    where = Written(tmp_path / "it", MODEL)
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(write, where.directory, MODEL, TP2, 1, offered, engine=ENGINE)
        while not (where.directory / "digests-0.json").exists() and not training.done():
            time.sleep(0.05)
        with VllmStudent(where.directory, MODEL, ENGINE, seed=1, decode=str, end_of_turn=END) as student:
            student.sync(where.checkpoint(), 0, where.digests())
            quantised = reference(where)

            def served() -> None:
                """Apart as two implementations in BF16 are, and less than quantised weights are from the trainer's."""
                apart = np.abs(student.logprobs(where.tokens) - quantised)
                assert apart.max() < 0.3
                assert apart.mean() < 0.25 * np.abs(where.logprobs() - quantised).mean()

            served()
            for version, offer in enumerate(offered, 1):
                report = student.sync(offer, version, where.digests())
                assert report.tensors == len(where.digests())
                served()
            training.result()
            # Quantised weights are near the trainer's, and the canary takes them; other weights are not.
            tokens, logprobs = where.tokens[:64], where.logprobs()[:63]
            canary = Canary(tokens=tuple(tokens.tolist()), logprobs=tuple(logprobs.tolist()))
            student.sync(where.checkpoint(), 3, where.digests(), canary)
            off = replace(canary, logprobs=tuple((logprobs[::-1]).tolist()))
            with pytest.raises(WeightSyncError, match="log-probs of the canary"):
                student.sync(where.checkpoint(), 4, where.digests(), off)
    assert any("float8_e4m3fn" in digest for digest in where.digests().values())
