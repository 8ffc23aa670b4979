"""The weights in a trainer's memory: which engine gets which source, and the errors when there is none."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights import weight_server
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports.p2p import free_address
from megatron_dagger.weights.transports.shared_memory import socket_path, this_host
from megatron_dagger.weights.weight_server import WeightServer, request_weights

LAYOUT = SourceLayout(padded_vocab_size=128, tensor_model_parallel_size=2)
HERE = [this_host()] * 2


@contextmanager
def served(server, version):
    """Let the trainer serve tickets while the block runs; yield the list of its sources."""
    sources, stop = [], threading.Event()

    def serve():
        while not stop.is_set():
            if (source := server.next_source()) is not None:
                sources.append(source)

    with ThreadPoolExecutor(1) as pool, server.serving(version):
        serving = pool.submit(serve)
        try:
            yield sources
        finally:
            stop.set()
            serving.result()


@pytest.mark.parametrize(
    ("hosts", "kind"),
    [(HERE, "shared_memory"), ([this_host(), "another"], "p2p"), (["another", "another"], "p2p")],
)
def test_each_engine_gets_its_own_source(tmp_path, hosts, kind):
    with served(WeightServer(tmp_path, LAYOUT, hosts), 3) as sent, ThreadPoolExecutor(3) as pool:
        requests = [pool.submit(request_weights, tmp_path, 3) for _ in range(3)]
        received = [request.result(20) for request in requests]
        if kind == "shared_memory":
            assert all(Path(source.address).stat().st_mode & 0o777 == 0o700 for source in received)
            assert all(len(socket_path(source.address, 1023)) < 100 for source in received)
    assert sorted(source.address for source in received) == sorted(source.address for source in sent)
    assert len({source.address for source in received}) == 3
    assert all(source.kind == kind and source.layout == LAYOUT for source in received)
    assert not any(Path(source.address).exists() for source in received)


def test_engines_on_the_trainers_host_and_elsewhere_are_both_served(tmp_path):
    with served(WeightServer(tmp_path, LAYOUT, HERE), 3):
        assert [request_weights(tmp_path, 3).kind for _ in range(2)] == ["shared_memory", "shared_memory"]
        write_json(tmp_path / "trainer.json", {**read_json(tmp_path / "trainer.json"), "host": "another"})
        assert [request_weights(tmp_path, 3).kind for _ in range(2)] == ["p2p", "p2p"]


def test_an_engine_does_not_wait_for_a_trainer_that_trains_or_has_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_server, "_READY_S", 0.2)
    server = WeightServer(tmp_path, LAYOUT, HERE)
    with server.serving(3), pytest.raises(WeightSyncError, match="serves version 3 of the weights, not 4"):
        request_weights(tmp_path, 4)
    with pytest.raises(WeightSyncError, match="serves version none of the weights, not 3"):
        request_weights(tmp_path, 3)
    assert server.next_source() is None


def test_an_engine_waits_until_the_deadline_for_a_trainer_that_does_not_serve_its_ticket(tmp_path):
    with (
        WeightServer(tmp_path, LAYOUT, HERE).serving(3),
        pytest.raises(WeightSyncError, match="did not answer within 1 s"),
    ):
        request_weights(tmp_path, 3, deadline_s=1.0)


def test_a_missing_and_a_dead_trainer_give_different_errors(tmp_path):
    with pytest.raises(WeightSyncError, match="the run has no resident trainer"):
        request_weights(tmp_path, 0)
    write_json(tmp_path / "trainer.json", {"address": free_address()})
    with pytest.raises(WeightSyncError, match="did not answer within 1 s"):
        request_weights(tmp_path, 0, deadline_s=1.0)


def test_an_abandoned_ticket_for_an_earlier_version_is_not_served_later(tmp_path):
    server = WeightServer(tmp_path, LAYOUT, HERE)
    with server.serving(3), pytest.raises(WeightSyncError, match="did not answer"):
        request_weights(tmp_path, 3, deadline_s=0.2)
    with server.serving(4):
        assert server.next_source() is None
