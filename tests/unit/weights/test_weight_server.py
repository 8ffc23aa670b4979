"""Asking a trainer for the weights in its memory: who gets which offer, and what is said where there is none."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")

from megatron_dagger.store.atomic import read_json, write_json
from megatron_dagger.weights import weight_server as desk
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports.p2p import free_address
from megatron_dagger.weights.transports.shared_memory import socket_path, this_host
from megatron_dagger.weights.weight_server import WeightServer, request_weights

SOURCE = SourceLayout(padded_vocab_size=128, tensor_model_parallel_size=2)


HERE = [this_host()] * 2


@contextmanager
def answering(trainer, version):
    """In the block the trainer answers who asks; the Offers that it has made."""
    made, ended = [], threading.Event()

    def answer():
        while not ended.is_set():
            if (offer := trainer.next_offer()) is not None:
                made.append(offer)

    with ThreadPoolExecutor(1) as pool, trainer.serving(version):
        answers = pool.submit(answer)
        try:
            yield made
        finally:
            ended.set()
            answers.result()


@pytest.mark.parametrize(
    ("hosts", "kind"), [(HERE, "host"), ([this_host(), "another"], "live"), (["another", "another"], "live")]
)
def test_each_engine_that_asks_is_told_of_an_offer_of_its_own(tmp_path, hosts, kind):
    with answering(WeightServer(tmp_path, SOURCE, hosts), 3) as made, ThreadPoolExecutor(3) as pool:
        told = [asking.result(20) for asking in [pool.submit(request_weights, tmp_path, 3) for _ in range(3)]]
        if kind == "host":
            assert all(Path(offer.address).stat().st_mode & 0o777 == 0o700 for offer in told)
            assert all(len(socket_path(offer.address, 1023)) < 100 for offer in told)
    assert sorted(offer.address for offer in told) == sorted(offer.address for offer in made)
    assert len({offer.address for offer in told}) == 3
    assert all(offer.kind == kind and offer.source == SOURCE for offer in told)
    assert not any(Path(offer.address).exists() for offer in told)


def test_engines_on_the_trainers_host_and_elsewhere_are_served_alike(tmp_path):
    with answering(WeightServer(tmp_path, SOURCE, HERE), 3):
        assert [request_weights(tmp_path, 3).kind for _ in range(2)] == ["host", "host"]
        write_json(tmp_path / "trainer.json", {**read_json(tmp_path / "trainer.json"), "host": "another"})
        assert [request_weights(tmp_path, 3).kind for _ in range(2)] == ["live", "live"]


def test_a_trainer_that_trains_or_has_other_weights_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(desk, "_READY_S", 0.2)
    trainer = WeightServer(tmp_path, SOURCE, HERE)
    with trainer.serving(3), pytest.raises(WeightSyncError, match="offers version 3 of"):
        request_weights(tmp_path, 4)
    with pytest.raises(WeightSyncError, match="offers version none of"):
        request_weights(tmp_path, 3)
    assert trainer.next_offer() is None


def test_a_trainer_that_stops_serving_in_between_is_waited_for_until_the_deadline(tmp_path):
    with (
        WeightServer(tmp_path, SOURCE, HERE).serving(3),
        pytest.raises(WeightSyncError, match="did not answer within 1 s"),
    ):
        request_weights(tmp_path, 3, deadline_s=1.0)


def test_no_trainer_and_a_dead_one_are_told_apart(tmp_path):
    with pytest.raises(WeightSyncError, match="no trainer that lives"):
        request_weights(tmp_path, 0)
    write_json(tmp_path / "trainer.json", {"address": free_address()})
    with pytest.raises(WeightSyncError, match="did not answer within 1 s"):
        request_weights(tmp_path, 0, deadline_s=1.0)


def test_who_asked_for_an_earlier_version_and_left_costs_nothing_later(tmp_path):
    trainer = WeightServer(tmp_path, SOURCE, HERE)
    with trainer.serving(3), pytest.raises(WeightSyncError, match="did not answer"):
        request_weights(tmp_path, 3, deadline_s=0.2)
    with trainer.serving(4):
        assert trainer.next_offer() is None
