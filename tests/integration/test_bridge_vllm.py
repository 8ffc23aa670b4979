"""Megatron trains and saves, vLLM takes over and serves: the same weights, the same log-probs.

Real checkpoints, written by Megatron-Core under several parallel layouts; the real engine, started
once for tied and once for untied embeddings. The vocabulary (1000) is padded in Megatron.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("megatron.core", reason="Megatron-Core is not installed")

from megatron_dagger.config import (
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SamplingConfig,
    TrainingConfig,
    to_dict,
)
from megatron_dagger.policies.base import Policy, PolicyError
from megatron_dagger.policies.vllm_engine import Sampling
from megatron_dagger.policies.vllm_student import VllmStudent
from megatron_dagger.training.launch import launch
from megatron_dagger.types import State
from megatron_dagger.weights.digest import digests
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.megatron_checkpoint import MegatronCheckpoint

ROOT = Path(__file__).resolve().parents[2]
TIED = ModelConfig(num_layers=2, vocab_size=1000, init_std=0.2)  # large weights: log-probs far from uniform
UNTIED = replace(TIED, tie_embeddings=False)
TP2 = ParallelConfig(world_size=2, tensor_model_parallel_size=2)
PP2 = ParallelConfig(world_size=2, pipeline_model_parallel_size=2)
ONE = ParallelConfig()
END = 7
TOLERANCE = 1e-3  # of log-probs in fp32: what the project promises


@dataclasses.dataclass(frozen=True)
class Written:
    """What ``bridge_writer`` left for a model and layout."""

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


def write(directory: Path, model: ModelConfig, parallel: ParallelConfig, versions: int) -> Written:
    directory.mkdir()
    training = TrainingConfig(parallel=parallel, sequence_length=320, global_batch_tokens=320)
    job = {"model": to_dict(model), "training": to_dict(training), "versions": versions}
    (directory / "job.json").write_text(json.dumps(job))
    (directory / "config.json").write_text(json.dumps(model.hf_config()))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, 300).astype(np.int32)
    np.save(directory / "tokens.npy", tokens)
    arguments = ["tests.integration.bridge_writer", str(directory)]
    launch(arguments, parallel, directory / "logs", 300, env={"PYTHONPATH": str(ROOT)})
    return Written(directory, model)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """By name: the tied model from one process (two versions) and from PP2, the untied one from TP2."""
    root = tmp_path_factory.mktemp("megatron")
    return {
        "one": write(root / "one", TIED, ONE, 2),
        "pp2": write(root / "pp2", TIED, PP2, 1),
        "tp2": write(root / "tp2", UNTIED, TP2, 1),
    }


def start(where: Written, workers: int = 1) -> VllmStudent:
    engine = EngineConfig(max_model_len=512, kv_cache_memory_mib=32, start_deadline_s=300, tensor_parallel_size=workers)
    student = VllmStudent(where.directory, where.model, engine, seed=1, decode=str, end_of_turn=END)
    student.start()
    return student


@pytest.fixture(scope="module")
def tied_student(written):
    student = start(written["one"])
    yield student
    student.close()


@pytest.fixture
def student(tied_student, written):
    """The tied model's engine, serving version 0 of its weights."""
    tied_student.sync(written["one"].checkpoint(), 0, written["one"].digests())
    yield tied_student
    tied_student.config = replace(tied_student.config, request_deadline_s=600.0)
    tied_student.end_of_turn = END


def state(seed: int, length: int = 40) -> State:
    tokens = np.random.default_rng(seed).integers(0, 1000, length).astype(np.int32)
    return State(messages=(), tokens=tokens, seed=seed)


def served(student: VllmStudent, where: Written) -> np.ndarray:
    return student.logprobs(where.tokens)


def transformers_logprobs(where: Written) -> np.ndarray:
    """Hugging Face's log-probs of the tokens, with the checkpoint's weights under canonical names."""
    import torch
    import transformers

    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**where.model.hf_config())).eval()
    weights = dict(MegatronCheckpoint(where.checkpoint()).canonical_tensors(where.model))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if where.model.tie_embeddings else [])
    model.tie_weights()
    tokens = torch.from_numpy(where.tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()


@pytest.mark.parametrize("layout", ["one", "pp2", "tp2"])
def test_the_digests_of_the_file_are_those_of_the_trainers_memory(written, layout):
    where = written[layout]
    assert digests(MegatronCheckpoint(where.checkpoint()).canonical_tensors(where.model)) == where.digests()


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_served_logprobs_are_megatrons_and_transformers_tied(student, written, layout):
    where = written[layout]
    report = student.sync(where.checkpoint(), 3, where.digests())
    assert (report.weight_version, report.tensors) == (3, len(where.digests()))
    got = served(student, where)
    assert np.ptp(where.logprobs()) > 1, "the reference must be far from uniform to mean something"
    assert np.abs(got - where.logprobs()).max() < TOLERANCE
    assert np.abs(got - transformers_logprobs(where)).max() < TOLERANCE


def test_new_weights_change_what_is_served_and_the_prefix_cache_is_emptied(student, written):
    where, prompt = written["one"], written["one"].tokens.tolist()
    greedy = Sampling(temperature=0.0, max_tokens=8)

    def complete():
        return student._thread.submit(prompt, greedy)[1].result(120)

    complete()
    warm = complete()
    assert warm.cached_tokens > 0, "the same prompt again must come from the cache"
    student.sync(where.checkpoint(1), 1, where.digests(1))
    fresh = complete()
    assert fresh.cached_tokens == 0
    assert (warm.weight_version, fresh.weight_version) == ("0", "1")
    assert np.abs(served(student, where) - where.logprobs(1)).max() < TOLERANCE
    assert np.abs(where.logprobs(1) - where.logprobs(0)).max() > 0.1
    # What was sampled after the update agrees with the new weights, token by token.
    whole = np.array([*prompt, *fresh.tokens])
    assert np.abs(student.logprobs(whole)[-len(fresh.tokens) :] - fresh.logprobs).max() < TOLERANCE
    assert not np.array_equal(warm.tokens, fresh.tokens)


def test_an_action_is_verbatim_versioned_and_reproducible_in_any_batch(student):
    policy = student.with_sampling(SamplingConfig(temperature=1.0, top_p=0.95, max_tokens=12))
    assert isinstance(policy, Policy)
    assert isinstance(student, Policy)

    async def together(seeds):
        return await asyncio.gather(*[policy.act(state(seed)) for seed in seeds])

    [alone] = asyncio.run(together([5]))
    crowd = asyncio.run(together(range(16)))
    assert np.array_equal(alone.tokens, crowd[5].tokens)
    assert alone.tokens.dtype == np.int32
    assert alone.logprobs.dtype == np.float32
    assert {action.weight_version for action in crowd} == {0}
    assert len({tuple(action.tokens) for action in crowd}) == 16
    same_prompt = replace(state(5), seed=6)
    assert not np.array_equal(asyncio.run(policy.act(same_prompt)).tokens, alone.tokens)
    # The log-probs are the model's own at temperature 1, whatever the sampling was.
    whole = np.concatenate([state(5).tokens, alone.tokens])
    assert np.abs(student.logprobs(whole)[-len(alone.tokens) :] - alone.logprobs).max() < TOLERANCE


def test_many_long_seeded_prompts_at_once_are_sampled_as_if_alone(student):
    """More prompt tokens than fit one step: a prompt that vLLM cuts in pieces would end the engine on the CPU."""
    policy = student.with_sampling(SamplingConfig(temperature=1.0, top_p=0.95, max_tokens=4))

    async def together(seeds):
        return await asyncio.gather(*[policy.act(state(seed, 400)) for seed in seeds])

    crowd = asyncio.run(together(range(12)))
    assert np.array_equal(asyncio.run(together([11]))[0].tokens, crowd[11].tokens)


def test_a_turn_ends_with_the_end_of_turn_token_which_is_kept(student):
    student.set_sampling(SamplingConfig(temperature=1.0, top_p=1.0, max_tokens=12))
    free = asyncio.run(student.act(state(1)))
    assert len(free.tokens) == 12
    student.end_of_turn = int(free.tokens[4])
    ended = asyncio.run(student.act(state(1)))
    stop = free.tokens.tolist().index(student.end_of_turn) + 1
    assert ended.tokens.tolist() == free.tokens[:stop].tolist()
    assert ended.text == str(free.tokens[: stop - 1])


def test_a_long_conversation_is_cut_at_or_refused_by_the_engines_length(student):
    student.set_sampling(SamplingConfig(max_tokens=64))
    assert len(asyncio.run(student.act(state(1, 509))).tokens) <= 3
    with pytest.raises(PolicyError, match="max_model_len is 512"):
        asyncio.run(student.act(state(1, 512)))
    with pytest.raises(ValueError, match="2 to 511 tokens"):
        student.logprobs(np.zeros(512, np.int32))


def test_a_deadline_passes_for_one_request_and_the_engine_goes_on(student):
    student.set_sampling(SamplingConfig(max_tokens=400, top_p=1.0, temperature=1.0))
    student.config = replace(student.config, request_deadline_s=0.02)
    with pytest.raises(PolicyError, match="request_deadline_s=0"):
        asyncio.run(student.act(state(1)))
    student.config = replace(student.config, request_deadline_s=120.0)
    student.set_sampling(SamplingConfig(max_tokens=2))
    assert len(asyncio.run(student.act(state(2))).tokens) <= 2
    assert student._thread.run(lambda engine: engine._engine.get_num_unfinished_requests(), timeout_s=60) == 0


def damaged(where: Written, directory: Path, damage) -> Path:
    shutil.copytree(where.checkpoint(), directory)
    damage(directory)
    return directory


def flip_a_weight(directory: Path) -> None:
    stored = MegatronCheckpoint(directory).tensors["decoder.final_layernorm.weight"]
    [chunk] = stored.chunks
    with open(directory / chunk.file, "r+b") as file:
        data = os.pread(file.fileno(), chunk.length, chunk.start)
        at = _payload(data)
        file.seek(chunk.start + at)
        file.write(bytes([data[at] ^ 1]))


def _payload(archive: bytes) -> int:
    """Where the tensor's bytes begin in a torch.save archive (an uncompressed zip)."""
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
    where = written["one"]
    for name, damage, message in [
        ("truncated", truncate, r"distcp is truncated.*serves version 0 on"),
        ("no-index", lambda d: (d / ".metadata").unlink(), r"no complete Megatron checkpoint.*version 0 on"),
    ]:
        directory = damaged(where, tmp_path / name, damage)
        with pytest.raises(WeightSyncError, match=message):
            student.sync(directory, 9, where.digests())
        assert np.abs(served(student, where) - where.logprobs()).max() < TOLERANCE
        assert asyncio.run(student.act(state(0))).weight_version == 0


def test_a_flipped_bit_is_found_and_nothing_is_served_until_a_good_sync(student, written, tmp_path):
    where = written["one"]
    directory = damaged(where, tmp_path / "flipped", flip_a_weight)
    with pytest.raises(WeightSyncError, match=r"(model\.norm\.weight|final_layernorm).*it does not serve"):
        student.sync(directory, 9, where.digests())
    with pytest.raises(PolicyError, match="weights are mixed since a sync failed"):
        asyncio.run(student.act(state(0)))
    student.sync(where.checkpoint(1), 1, where.digests(1))
    assert np.abs(served(student, where) - where.logprobs(1)).max() < TOLERANCE


def test_weights_that_the_trainer_did_not_have_are_refused(student, written):
    where = written["one"]
    with pytest.raises(WeightSyncError, match=r"model\.embed_tokens\.weight.*not the trainer's"):
        student.sync(where.checkpoint(1), 1, where.digests(0))
    incomplete = {name: value for name, value in where.digests().items() if "q_norm" not in name}
    with pytest.raises(WeightSyncError, match=r"left over|missing"):
        student.sync(where.checkpoint(0), 1, incomplete)
    student.sync(where.checkpoint(0), 0, where.digests(0))
    assert np.abs(served(student, where) - where.logprobs(0)).max() < TOLERANCE


def test_what_the_bridge_uses_of_vllms_insides_is_still_there(student):
    """Fails, naming it, when a new vLLM changes what the bridge stands on."""
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
    assert "megatron_checkpoint" in factory.WeightTransferEngineFactory._registry
    assert {"weight_versions", "logprobs", "finish_reason"} <= set(CompletionOutput.__dataclass_fields__)
    assert "num_cached_tokens" in inspect.signature(RequestOutput.__init__).parameters
    assert "seed" in SamplingParams.__struct_fields__

    def output_layer(engine):
        worker = engine._engine.model_executor.driver_worker.worker
        [head] = [m for m in worker.model_runner.model.modules() if isinstance(m, ParallelLMHead)]
        return head.weight is worker.model_runner.model.model.embed_tokens.weight

    assert student._thread.run(output_layer, timeout_s=60), "the tied output layer is no longer the embedding"


def test_untied_embeddings_saved_under_tensor_parallelism_are_served(tied_student, written):
    """It ends the tied engine and starts another in the same process."""
    tied_student.close()
    with pytest.raises(PolicyError, match="the engine is gone: it was closed"):
        asyncio.run(tied_student.act(state(0)))
    where = written["tp2"]
    untied = start(where)
    try:
        with pytest.raises(PolicyError, match="call sync"):
            untied.logprobs(where.tokens)
        untied.sync(where.checkpoint(), 0, where.digests())
        got = served(untied, where)
        assert np.abs(got - where.logprobs()).max() < TOLERANCE
        assert np.abs(got - transformers_logprobs(where)).max() < TOLERANCE
        with pytest.raises(WeightSyncError, match=r"another model.*|lacks 'output_layer.weight'"):
            untied.sync(written["one"].checkpoint(), 1, written["one"].digests())
        assert np.abs(served(untied, where) - where.logprobs()).max() < TOLERANCE
    finally:
        untied.close()


@pytest.mark.slow
def test_several_workers_take_over_the_same_weights_and_recover_from_a_failed_sync(written):
    """Each vLLM worker is a process of its own; a failed update must not poison the answers after it."""
    where = written["pp2"]
    student = start(where, workers=2)
    try:
        student.sync(where.checkpoint(), 0, where.digests())
        assert np.abs(served(student, where) - where.logprobs()).max() < TOLERANCE
        wrong = {**where.digests(), "model.norm.weight": "0" * 64}
        with pytest.raises(WeightSyncError, match=r"worker 0: .*model\.norm\.weight.*it does not serve"):
            student.sync(where.checkpoint(), 1, wrong)
        with pytest.raises(PolicyError, match="mixed"):
            served(student, where)
        with pytest.raises(WeightSyncError, match=r"no complete Megatron checkpoint.*it does not serve"):
            student.sync(where.directory / "nowhere", 1, where.digests())
        student.sync(where.checkpoint(), 2, where.digests())
        assert np.abs(served(student, where) - where.logprobs()).max() < TOLERANCE
        with pytest.raises(WeightSyncError, match=r"no complete Megatron checkpoint.*it serves version 2 on"):
            student.sync(where.directory / "nowhere", 3, where.digests())
        assert np.abs(served(student, where) - where.logprobs()).max() < TOLERANCE
    finally:
        student.close()
