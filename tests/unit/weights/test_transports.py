"""What every transport must do: the conformance suite, and what is special to those with a trainer at the other end.

Source and target ranks are threads of this process, each with its own sockets, groups and buffers; where
one has to die, it is a process of its own.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dagger.config import ConfigError
from megatron_dagger.weights import families
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource, checkpoint_offer
from megatron_dagger.weights.transports import shared_memory as host
from megatron_dagger.weights.transports.open import open_transport, send_weights
from megatron_dagger.weights.transports.p2p import free_address
from tests.unit.weights.naive_shards import canonical_tensors, megatron_ranks, vllm_ranks
from tests.unit.weights.sample_models import PADDED, VOCAB, sample_model

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
ONE = SourceLayout(padded_vocab_size=PADDED)
SOURCES = {
    "one": ONE,
    "tp2": replace(ONE, tensor_model_parallel_size=2),
    "pp2-dp2": replace(ONE, pipeline_model_parallel_size=2, data_parallel_size=2),
}
TARGETS = {
    "one": TargetLayout(),
    "tp2": TargetLayout(tensor_parallel_size=2),
    "tp4-replicas2": TargetLayout(tensor_parallel_size=4, replicas=2),
}
KINDS = ("checkpoint", "host", "live")


def case(family="qwen3", tied=True):
    """A model, and canonical tensors of small whole numbers, which float32 and bfloat16 hold exactly."""
    moe = {"num_moe_experts": 8, "moe_ffn_hidden_size": 8} if family == "qwen3_moe" else {}
    model = sample_model(family, num_query_groups=2, vocab_size=VOCAB, tie_embeddings=tied, **moe)
    tensors = canonical_tensors(model, families.canonical_names(model))
    return model, {name: (1 + array % 199).astype(np.float32) for name, array in tensors.items()}


def as_torch(rank, dtype=torch.float32):
    """A naive rank's arrays as the trainer has them: every local expert a tensor of its own."""
    tensors = {}
    for name, array in rank.items():
        each = [(name.format(i), part) for i, part in enumerate(array)] if "{}" in name else [(name, array)]
        tensors |= {key: torch.from_numpy(np.ascontiguousarray(part)).to(dtype) for key, part in each}
    return tensors


def save(directory, model, tensors, dtype=torch.float32):
    """A checkpoint as Megatron writes it: the layers stacked."""
    stacked = {}
    for name, tensor in as_torch(megatron_ranks(model, ONE, tensors)[0], dtype).items():
        head, _, rest = name.rpartition("layers.")
        stacked.setdefault(f"{head}layers.{rest.partition('.')[2]}" if head else name, []).append(tensor)
    state = {key: torch.stack(parts) if "layers." in key else parts[0] for key, parts in stacked.items()}
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)


def offered(kind, directory, source, model, tensors, **settings):
    """An WeightSource of this kind; one of a checkpoint lies there."""
    if kind == "checkpoint":
        save(directory, model, tensors)
        return replace(checkpoint_offer(directory, model), **settings)
    address = str(directory) if kind == "host" else free_address()
    return WeightSource(kind=kind, address=address, source=source, **{"deadline_s": 20.0, **settings})


def transfer(agreement, model, tensors, dtype=torch.float32):
    """Carry a transfer out with all ranks of both ends at once; returns every target rank's arrays."""
    wanted = vllm_ranks(model, agreement.target, tensors)
    held = megatron_ranks(model, agreement.offer.source, tensors)
    senders = [] if agreement.offer.kind == "checkpoint" else [as_torch(rank) for rank in held]
    with ThreadPoolExecutor(len(senders) + len(wanted)) as pool:
        sending = [pool.submit(send_weights, agreement, rank, mine, CPU) for rank, mine in enumerate(senders)]
        taking = [
            pool.submit(take, agreement, rank, {name: array.shape for name, array in wanted[rank].items()}, dtype)
            for rank in range(len(wanted))
        ]
        got = [future.result() for future in taking]
        for future in sending:
            future.result()
    return got, wanted


def take(agreement, rank, shapes, dtype=torch.float32):
    got = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    with open_transport(agreement, rank, CPU) as transport:
        for copy, block in transport.receive(agreement.plan.by_target[rank]):
            assert block.shape == copy.target.shape and block.nbytes <= agreement.wire.bucket_bytes
            got[copy.target_parameter][copy.target.slices] = block
    return got


def assert_equal(got, wanted):
    for rank, parameters in enumerate(wanted):
        for name, array in parameters.items():
            assert np.array_equal(got[rank][name].float().numpy(), array), (rank, name)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Of 400 bytes: most tensors are cut, many share one."""
    monkeypatch.setattr(WeightSource, "bucket_bytes", 400)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_target_rank_gets_its_parameters(kind, source, target, tmp_path):
    model, tensors = case(tied=source != "tp2")
    offer = offered(kind, tmp_path, SOURCES[source], model, tensors)
    agreement = TransferSpec(model=model, target=TARGETS[target], dtype="float32", offer=offer)
    assert_equal(*transfer(agreement, model, tensors))
    assert not list(tmp_path.glob("*.sock")), "nothing is left behind"


@pytest.mark.parametrize("kind", ["host", "live"])
def test_experts_and_another_dtype(kind, tmp_path):
    model, tensors = case("qwen3_moe")
    source = replace(ONE, tensor_model_parallel_size=2, data_parallel_size=2, expert_model_parallel_size=2)
    target = TargetLayout(tensor_parallel_size=2, enable_expert_parallel=True)
    offer = offered(kind, tmp_path, source, model, tensors)
    agreement = TransferSpec(model=model, target=target, dtype="bfloat16", offer=offer)
    assert_equal(*transfer(agreement, model, tensors, torch.bfloat16))


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path):
    model, tensors = case()
    offer = offered("checkpoint", tmp_path, ONE, model, tensors)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="bfloat16", offer=offer)
    with pytest.raises(WeightSyncError, match=r"holds float32, the engine wants bfloat16: set rollout\.engine\.dtype"):
        open_transport(agreement, 0, CPU)


@pytest.mark.parametrize("kind", ["host", "live"])
def test_ends_that_do_not_agree_say_so(kind, tmp_path):
    model, tensors = case()
    offer = offered(kind, tmp_path, ONE, model, tensors, deadline_s=5.0)
    ours = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    theirs = replace(ours, model=replace(model, layernorm_epsilon=1e-3))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, theirs, 0, as_torch(megatron_ranks(model, ONE, tensors)[0]), CPU)
        with pytest.raises(WeightSyncError, match="carries out another plan"):
            open_transport(ours, 0, CPU)
        with pytest.raises(WeightSyncError):
            sending.result()


@pytest.mark.parametrize("kind", ["host", "live"])
def test_a_trainer_that_never_comes_is_an_error_within_the_deadline(kind, tmp_path):
    model, tensors = case()
    offer = offered(kind, tmp_path, ONE, model, tensors, deadline_s=1.0)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"cannot be reached|no connection through the store"):
        open_transport(agreement, 0, CPU)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["host", "live"])
def test_an_engine_that_never_comes_is_an_error_within_the_deadline(kind, tmp_path):
    model, tensors = case()
    offer = offered(kind, tmp_path, ONE, model, tensors, deadline_s=1.0)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"did not come within 1 s|no connection"):
        send_weights(agreement, 0, as_torch(megatron_ranks(model, ONE, tensors)[0]), CPU)
    assert time.monotonic() - began < 10


def test_a_trainer_that_cannot_share_its_memory_fails_the_transfer_and_not_itself(tmp_path):
    model, tensors = case()
    offer = WeightSource(kind="host", address=str(tmp_path / "nowhere"), source=ONE)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    with pytest.raises(WeightSyncError, match=r"source rank 0 cannot share memory through .*nowhere"):
        send_weights(agreement, 0, as_torch(megatron_ranks(model, ONE, tensors)[0]), CPU)


SENDER = """
import os, pickle, sys, torch
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.open import send_weights
from tests.unit.weights import test_transports as tests
WeightSource.bucket_bytes = 400
agreement = pickle.load(sys.stdin.buffer)
model, tensors = tests.case()
held = tests.as_torch(tests.megatron_ranks(model, agreement.offer.source, tensors)[0])
class Deadly(dict):
    def __getitem__(self, name):
        if name == "decoder.layers.1.mlp.linear_fc1.weight":
            os.kill(os.getpid(), 9)
        return super().__getitem__(name)
send_weights(agreement, 0, Deadly(held), torch.device("cpu"))
"""


@pytest.mark.parametrize("kind", ["host", "live"])
def test_a_trainer_killed_in_the_middle_is_named_at_once_and_the_next_transfer_works(kind, tmp_path):
    import pickle

    model, tensors = case()
    offer = offered(kind, tmp_path, ONE, model, tensors, deadline_s=60.0)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    process = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(agreement))
        process.stdin.close()
        shapes = {name: array.shape for name, array in vllm_ranks(model, TargetLayout(), tensors)[0].items()}
        with pytest.raises(WeightSyncError, match=r"source rank 0 (is gone|sent nothing)"):
            take(agreement, 0, shapes)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    again = replace(agreement, offer=replace(offer, address=offer.address if kind == "host" else free_address()))
    assert_equal(*transfer(again, model, tensors))


def test_an_engine_that_ends_in_the_middle_is_named(tmp_path):
    model, tensors = case()
    offer = offered("host", tmp_path, ONE, model, tensors)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, agreement, 0, as_torch(megatron_ranks(model, ONE, tensors)[0]), CPU)
        with open_transport(agreement, 0, CPU) as transport:
            next(transport.receive(agreement.plan.by_target[0]))
        with pytest.raises(WeightSyncError, match="source rank 0: target rank 0 is gone"):
            sending.result()


def test_strangers_are_turned_away(tmp_path):
    model, tensors = case()
    offer = offered("host", tmp_path, ONE, model, tensors)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, agreement, 0, {}, CPU)
        with contextlib.closing(host._reach(str(tmp_path / "source-0.sock"), 30.0)) as stranger:
            stranger.sendall(b'{"target_rank": 5, "plan": ""}\n')
            with pytest.raises(WeightSyncError, match="target rank 5 came, which was not awaited"):
                sending.result()


def test_a_source_without_a_tensor_names_it(tmp_path):
    model, tensors = case()
    offer = offered("host", tmp_path, ONE, model, tensors)
    agreement = TransferSpec(model=model, target=TargetLayout(), dtype="float32", offer=offer)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, agreement, 0, {}, CPU)
        with contextlib.suppress(WeightSyncError), open_transport(agreement, 0, CPU) as transport:
            list(transport.receive(agreement.plan.by_target[0]))
        with pytest.raises(WeightSyncError, match=r"has no tensor 'embedding\.word_embeddings\.weight'"):
            sending.result()


def test_no_thread_is_left():
    assert threading.active_count() < 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bucket_mib": 0}, "bucket_mib must be positive"),
        ({"deadline_s": 0.0}, "deadline_s must be positive"),
        ({"kind": "checkpoint", "source": replace(ONE, data_parallel_size=2)}, "one whole, not 2 ranks"),
    ],
)
def test_an_offer_that_makes_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        WeightSource(**{"kind": "host", "address": "x", "source": ONE, **settings})
