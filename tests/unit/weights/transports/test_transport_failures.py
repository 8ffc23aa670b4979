"""Failed transfers from a trainer: an error that names the peer, within the deadline, and nothing left behind."""

import contextlib
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource, shared_memory
from megatron_dagger.weights.transports.open import open_transport, send_weights, transport_module
from tests.unit.weights.naive_shards import megatron_ranks, vllm_ranks
from tests.unit.weights.transfers import (
    CPU,
    SINGLE,
    TRAINER_KINDS,
    as_torch,
    assert_equal,
    model_and_tensors,
    new_source,
    receive,
    transfer,
)

ROOT = Path(__file__).resolve().parents[4]


def single_rank_spec(kind, directory, **settings):
    """Return a model, its tensors, and the spec of a transfer from a single rank to a single rank."""
    model, tensors = model_and_tensors()
    source = new_source(kind, directory, SINGLE, model, tensors, **settings)
    return model, tensors, TransferSpec(model=model, target=TargetLayout(), dtype="float32", source=source)


def trainer_tensors(model, tensors):
    return as_torch(megatron_ranks(model, SINGLE, tensors)[0])


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_ranks_with_different_plans_refuse_each_other(kind, tmp_path):
    model, tensors, spec = single_rank_spec(kind, tmp_path, deadline_s=5.0)
    different = replace(spec, model=replace(model, layernorm_epsilon=1e-3))
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, different, 0, trainer_tensors(model, tensors), CPU)
        with pytest.raises(WeightSyncError, match="carries out another plan"):
            open_transport(spec, 0, CPU)
        with pytest.raises(WeightSyncError):
            sending.result()


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_a_trainer_that_never_connects_is_an_error_within_the_deadline(kind, tmp_path):
    _, _, spec = single_rank_spec(kind, tmp_path, deadline_s=1.0)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"cannot be reached|no connection through the store"):
        open_transport(spec, 0, CPU)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_an_engine_that_never_connects_is_an_error_within_the_deadline(kind, tmp_path):
    model, tensors, spec = single_rank_spec(kind, tmp_path, deadline_s=1.0)
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"did not connect within 1 s|no connection"):
        send_weights(spec, 0, trainer_tensors(model, tensors), CPU)
    assert time.monotonic() - began < 10


def test_a_trainer_that_cannot_share_its_memory_fails_the_transfer_and_not_itself(tmp_path):
    model, tensors = model_and_tensors()
    source = WeightSource(kind="shared_memory", address=str(tmp_path / "nowhere"), layout=SINGLE)
    spec = TransferSpec(model=model, target=TargetLayout(), dtype="float32", source=source)
    with pytest.raises(WeightSyncError, match=r"source rank 0 cannot share memory through .*nowhere"):
        send_weights(spec, 0, trainer_tensors(model, tensors), CPU)


SENDER = """
import os, pickle, sys, torch
from megatron_dagger.weights.transports import WeightSource
from megatron_dagger.weights.transports.open import send_weights
from tests.unit.weights import transfers
WeightSource.bucket_bytes = 400
spec = pickle.load(sys.stdin.buffer)
model, tensors = transfers.model_and_tensors()
tensors = transfers.as_torch(transfers.megatron_ranks(model, spec.source.layout, tensors)[0])
class Deadly(dict):
    def __getitem__(self, name):
        if name == "decoder.layers.1.mlp.linear_fc1.weight":
            os.kill(os.getpid(), 9)
        return super().__getitem__(name)
send_weights(spec, 0, Deadly(tensors), torch.device("cpu"))
"""


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_a_trainer_killed_in_the_middle_is_named_at_once_and_the_next_transfer_works(kind, tmp_path):
    model, tensors, spec = single_rank_spec(kind, tmp_path, deadline_s=60.0)
    process = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(spec))
        process.stdin.close()
        shapes = {name: array.shape for name, array in vllm_ranks(model, TargetLayout(), tensors)[0].items()}
        with pytest.raises(WeightSyncError, match=r"source rank 0 (is gone|sent nothing)"):
            receive(spec, 0, shapes)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
    if kind == "p2p":  # shared memory: the killed trainer's socket is still there, and is replaced
        spec = replace(spec, source=replace(spec.source, address=transport_module(kind).new_address("127.0.0.1", None)))
    assert_equal(*transfer(spec, model, tensors))


def test_an_engine_that_ends_in_the_middle_is_named(tmp_path):
    model, tensors, spec = single_rank_spec("shared_memory", tmp_path)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, spec, 0, trainer_tensors(model, tensors), CPU)
        with open_transport(spec, 0, CPU) as transport:
            next(transport.receive(spec.plan.by_target[0]))
        with pytest.raises(WeightSyncError, match="source rank 0: target rank 0 is gone"):
            sending.result()


def test_a_rank_that_is_not_in_the_plan_is_refused(tmp_path):
    _, _, spec = single_rank_spec("shared_memory", tmp_path)
    path = shared_memory.socket_path(spec.source.address, 0)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, spec, 0, {}, CPU)
        with contextlib.closing(shared_memory._connect_socket(path, 30.0)) as stranger:
            stranger.sendall(b'{"target_rank": 5, "plan": ""}\n')
            with pytest.raises(WeightSyncError, match="target rank 5 connected unexpectedly"):
                sending.result()


def test_a_source_rank_without_a_tensor_names_it(tmp_path):
    _, _, spec = single_rank_spec("shared_memory", tmp_path)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_weights, spec, 0, {}, CPU)
        with contextlib.suppress(WeightSyncError), open_transport(spec, 0, CPU) as transport:
            list(transport.receive(spec.plan.by_target[0]))
        with pytest.raises(WeightSyncError, match=r"has no tensor 'embedding\.word_embeddings\.weight'"):
            sending.result()


def test_no_thread_remains():
    assert threading.active_count() < 20
