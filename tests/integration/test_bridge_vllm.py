"""Weights trained and saved by Megatron are served by vLLM: the same weights, the same log-probs.

Megatron-Core writes the checkpoints under several parallel layouts. The engine is started twice: with tied embeddings,
and with untied embeddings and YaRN. The vocabulary (1000) is padded in Megatron.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import ConfigError
from megatron_dagger.policies.base import PolicyError
from megatron_dagger.policies.vllm.engine import Sampling
from megatron_dagger.policies.vllm.student import VllmStudent
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.torch_dist.reader import MegatronCheckpoint
from megatron_dagger.weights.verify.canary import Canary
from megatron_dagger.weights.verify.digest import canonical_digests
from tests.integration.converted import model_logprobs
from tests.integration.served import TOLERANCE, YARN, Written, sample, start, state

ROOT = Path(__file__).resolve().parents[2]


def served(student: VllmStudent, output: Written) -> np.ndarray:
    return student.logprobs(output.tokens)


def transformers_logprobs(output: Written) -> np.ndarray:
    """Return Transformers' log-probs of the tokens, with the checkpoint's weights under canonical names."""
    import transformers

    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**output.model.hf_config())).eval()
    weights = dict(MegatronCheckpoint(output.checkpoint()).canonical_tensors(output.model))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if output.model.tie_embeddings else [])
    model.tie_weights()
    return model_logprobs(model, output.tokens)


@pytest.mark.parametrize("layout", ["one", "pp2", "tp2"])
def test_the_digests_of_the_checkpoint_equal_those_of_the_trainers_memory(written, layout):
    output = written[layout]
    stored = MegatronCheckpoint(output.checkpoint()).canonical_tensors(output.model)
    assert canonical_digests(stored, output.model) == output.digests()


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_served_logprobs_equal_those_of_megatron_and_transformers(student, written, layout):
    output = written[layout]
    report = student.sync(output.checkpoint(), 3, output.digests())
    assert (report.weight_version, report.tensors) == (3, len(output.digests()))
    logprobs = served(student, output)
    assert np.ptp(output.logprobs()) > 1, "the reference must be far from uniform to be meaningful"
    assert np.abs(logprobs - output.logprobs()).max() < TOLERANCE
    assert np.abs(logprobs - transformers_logprobs(output)).max() < TOLERANCE


def test_new_weights_change_the_output_and_empty_the_prefix_cache(student, written):
    output, prompt = written["one"], written["one"].tokens.tolist()
    greedy = Sampling(temperature=0.0, max_tokens=8)

    def complete():
        return student._thread.submit(prompt, greedy)[1].result(120)

    complete()
    warm = complete()
    assert warm.cached_tokens > 0, "the same prompt again must come from the cache"
    student.sync(output.checkpoint(1), 1, output.digests(1))
    fresh = complete()
    assert fresh.cached_tokens == 0
    assert (warm.weight_version, fresh.weight_version) == ("0", "1")
    assert np.abs(served(student, output) - output.logprobs(1)).max() < TOLERANCE
    assert np.abs(output.logprobs(1) - output.logprobs(0)).max() > 0.1
    # The tokens sampled after the update have the new weights' log-probs.
    whole = np.array([*prompt, *fresh.tokens])
    assert np.abs(student.logprobs(whole)[-len(fresh.tokens) :] - fresh.logprobs).max() < TOLERANCE
    assert not np.array_equal(warm.tokens, fresh.tokens)


def damaged(output: Written, directory: Path, damage) -> Path:
    shutil.copytree(output.checkpoint(), directory)
    damage(directory)
    return directory


def flip_a_weight(directory: Path) -> None:
    stored = MegatronCheckpoint(directory).tensors["decoder.final_layernorm.weight"]
    [chunk] = stored.chunks
    with open(directory / chunk.file, "r+b") as file:
        data = os.pread(file.fileno(), chunk.length, chunk.start)
        offset = _payload_offset(data)
        file.seek(chunk.start + offset)
        file.write(bytes([data[offset] ^ 1]))


def _payload_offset(archive: bytes) -> int:
    """Return the offset of the tensor's bytes in a torch.save archive (an uncompressed zip)."""
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        [entry] = [info for info in opened.infolist() if info.filename.endswith("/data/0")]
        name = int.from_bytes(archive[entry.header_offset + 26 : entry.header_offset + 28], "little")
        extra = int.from_bytes(archive[entry.header_offset + 28 : entry.header_offset + 30], "little")
    return entry.header_offset + 30 + name + extra


def truncate(directory: Path) -> None:
    file = max(directory.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


def test_a_truncated_checkpoint_leaves_the_old_weights_serving(student, written, tmp_path):
    output = written["one"]
    for name, damage, message in [
        ("truncated", truncate, r"distcp is truncated.*still serves version 0"),
        (
            "no-index",
            lambda d: (d / ".metadata").unlink(),
            r"not a complete Megatron checkpoint.*still serves version 0",
        ),
    ]:
        directory = damaged(output, tmp_path / name, damage)
        with pytest.raises(WeightSyncError, match=message):
            student.sync(directory, 9, output.digests())
        assert np.abs(served(student, output) - output.logprobs()).max() < TOLERANCE
        assert sample(student, state(0)).weight_version == 0


def test_a_flipped_bit_is_detected_and_the_previous_version_is_served_again(student, written, tmp_path):
    output = written["one"]
    directory = damaged(output, tmp_path / "flipped", flip_a_weight)
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight.*differs.*it still serves version 0"):
        student.sync(directory, 9, output.digests())
    assert np.abs(served(student, output) - output.logprobs(0)).max() < TOLERANCE
    assert sample(student, state(0)).weight_version == 0


def test_no_version_is_served_if_the_previous_one_is_gone(student, written, tmp_path):
    output = written["one"]
    gone = damaged(output, tmp_path / "gone", lambda directory: None)
    student.sync(gone, 5, output.digests())
    shutil.rmtree(gone)
    directory = damaged(output, tmp_path / "flipped", flip_a_weight)
    with pytest.raises(WeightSyncError, match=r"model\.norm\.weight.*it does not serve"):
        student.sync(directory, 9, output.digests())
    with pytest.raises(PolicyError, match="weights are mixed since a sync failed"):
        sample(student, state(0))
    student.sync(output.checkpoint(1), 1, output.digests(1))
    assert np.abs(served(student, output) - output.logprobs(1)).max() < TOLERANCE


def test_weights_with_other_logprobs_than_the_canarys_are_not_served(student, written):
    """Every byte is right but the log-probs are wrong, as with a stale packed copy."""
    output = written["one"]
    tokens, logprobs = output.tokens[:64], output.logprobs(1)[:63]
    canary = Canary(tokens=tuple(tokens.tolist()), logprobs=tuple(logprobs.tolist()))
    student.sync(output.checkpoint(1), 1, output.digests(1), canary)
    message = r"log-probs of the canary differ.*more than the 0\.001 allowed in float32; it still serves version 1"
    with pytest.raises(WeightSyncError, match=message):
        student.sync(output.checkpoint(0), 2, output.digests(0), canary)
    assert np.abs(served(student, output) - output.logprobs(1)).max() < TOLERANCE


def test_weights_with_other_digests_than_the_trainers_are_refused(student, written):
    output = written["one"]
    with pytest.raises(WeightSyncError, match=r"not the trainer's: tensor 'model\.embed_tokens\.weight' differs"):
        student.sync(output.checkpoint(1), 1, output.digests(0))
    incomplete = {name: value for name, value in output.digests().items() if "q_norm" not in name}
    with pytest.raises(WeightSyncError, match=r"q_norm\.weight' was received but never sent"):
        student.sync(output.checkpoint(0), 1, incomplete)
    assert np.abs(served(student, output) - output.logprobs(0)).max() < TOLERANCE


def test_the_parts_of_vllm_that_weight_sync_uses_still_exist(student):
    """Fail with the name of the interface that a new vLLM has changed."""
    from vllm import EngineArgs, SamplingParams
    from vllm.distributed.weight_transfer import base, factory
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.worker.gpu_worker import Worker

    fields = {field.name for field in dataclasses.fields(EngineArgs)}
    assert {
        "weight_transfer_config",
        "worker_extension_cls",
        "kv_cache_memory_bytes",
        "logprobs_mode",
    } <= fields
    for name in ("add_request", "step", "abort_request", "collective_rpc", "set_weight_version"):
        assert callable(getattr(LLMEngine, name, None)), f"LLMEngine.{name} is gone"
    for name in (
        "start_weight_update",
        "update_weights",
        "finish_weight_update",
        "init_weight_transfer_engine",
    ):
        assert callable(getattr(Worker, name, None)), f"Worker.{name} is gone"
    assert list(inspect.signature(Worker.update_weights).parameters) == ["self", "update_info"]
    abstract = base.WeightTransferEngine.__abstractmethods__
    assert abstract == {
        "init_transfer_engine",
        "start_weight_update",
        "receive_weights",
        "finish_weight_update",
        "shutdown",
    }
    assert "megatron_dagger" in factory.WeightTransferEngineFactory._registry
    assert {"weight_versions", "logprobs", "finish_reason"} <= set(CompletionOutput.__dataclass_fields__)
    assert "num_cached_tokens" in inspect.signature(RequestOutput.__init__).parameters
    assert "seed" in SamplingParams.__struct_fields__

    def output_layer(engine):
        worker = engine._engine.model_executor.driver_worker.worker
        [head] = [m for m in worker.model_runner.model.modules() if isinstance(m, ParallelLMHead)]
        return head.weight is worker.model_runner.model.model.embed_tokens.weight

    assert student._thread.run(output_layer, timeout_s=60), "the tied output layer is no longer the embedding"


def test_packed_layers_are_refused(student, written):
    """Only load_format=megatron keeps linear layers unpacked."""
    from vllm.model_executor.layers import utils

    output = written["one"]

    def first_layer(engine):
        return engine._engine.model_executor.driver_worker.worker.model_runner.model.model.layers[0].mlp.down_proj

    layer = student._thread.run(first_layer, timeout_s=60)
    before = layer.weight, layer.cpu_linear
    student._thread.run(lambda _: utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True), timeout_s=60)
    try:
        with pytest.raises(
            WeightSyncError, match=r"has packed its linear layers.*load_format=megatron.*it still serves version 0"
        ):
            student.sync(output.checkpoint(), 1, output.digests())
    finally:
        layer.weight, layer.cpu_linear = before
    student.sync(output.checkpoint(), 2, output.digests())
    assert np.abs(served(student, output) - output.logprobs(0)).max() < TOLERANCE


def test_untied_embeddings_and_yarn_saved_under_tensor_parallelism_are_served(tied_student, written):
    """Close the tied engine and start another in the same process. The tokens exceed RoPE's original range."""
    tied_student.close()
    with pytest.raises(PolicyError, match="the engine is gone: it was closed"):
        sample(tied_student, state(0))
    output = written["tp2"]
    untied = start(output)
    try:
        with pytest.raises(PolicyError, match="call sync"):
            untied.logprobs(output.tokens)
        untied.sync(output.checkpoint(), 0, output.digests())
        logprobs = served(untied, output)
        assert np.abs(logprobs - output.logprobs()).max() < TOLERANCE
        assert np.abs(logprobs - transformers_logprobs(output)).max() < TOLERANCE
        unscaled = transformers_logprobs(
            dataclasses.replace(output, model=dataclasses.replace(output.model, yarn=None))
        )
        beyond = len(unscaled) - YARN.original_max_position_embeddings
        assert np.abs(logprobs - unscaled)[-beyond:].mean() > 100 * TOLERANCE, "the scaling must matter here"
        with pytest.raises(WeightSyncError, match=r"another model.*|lacks 'output_layer.weight'"):
            untied.sync(written["one"].checkpoint(), 1, written["one"].digests())
        assert np.abs(served(untied, output) - output.logprobs()).max() < TOLERANCE
    finally:
        untied.close()


@pytest.mark.parametrize("extra", [{}, {"checkpoint": 1}, {"model": {}}, "'{"])
def test_a_loader_without_a_checkpoint_names_the_missing_setting(extra):
    from megatron_dagger.weights.vllm.plugin import _source_and_model

    with pytest.raises(ConfigError, match=r"needs model_loader_extra_config=.*DIRECTORY.*, got "):
        _source_and_model(extra)


def test_each_model_has_its_own_transfer_state():
    import torch

    from megatron_dagger.weights.vllm.plugin import TransferState

    first, second = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    TransferState(shares={}, error=None, touched=True).attach(first)
    assert TransferState.of(first).error is None
    assert TransferState.of(second).error == "no weights have been loaded yet"


@pytest.mark.slow
def test_several_workers_serve_the_same_weights_and_recover_from_a_failed_sync(written, tmp_path):
    """Each vLLM worker is a separate process. A failed update must not affect the replies after it."""
    output = written["pp2"]
    student = start(output, workers=2)
    try:
        student.sync(output.checkpoint(), 0, output.digests())
        assert np.abs(served(student, output) - output.logprobs()).max() < TOLERANCE
        wrong = {**output.digests(), "model.norm.weight": "float32 (64,) 0"}
        with pytest.raises(WeightSyncError, match=r"model\.norm\.weight.*it still serves version 0"):
            student.sync(output.checkpoint(), 1, wrong)
        truncated = damaged(output, tmp_path / "truncated", truncate)
        with pytest.raises(WeightSyncError, match=r"distcp is truncated.*it still serves version 0"):
            student.sync(truncated, 1, output.digests())
        assert np.abs(served(student, output) - output.logprobs()).max() < TOLERANCE
        student.sync(output.checkpoint(), 2, output.digests())
        assert np.abs(served(student, output) - output.logprobs()).max() < TOLERANCE
        with pytest.raises(WeightSyncError, match=r"not a complete Megatron checkpoint.*it still serves version 2"):
            student.sync(output.directory / "nowhere", 3, output.digests())
        assert np.abs(served(student, output) - output.logprobs()).max() < TOLERANCE
    finally:
        student.close()
