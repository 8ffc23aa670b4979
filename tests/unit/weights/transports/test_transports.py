"""The conformance suite of transports, run over all of TRANSPORTS.

Source and target ranks are threads of this process, each with its own sockets, groups and buffers.
"""

from dataclasses import replace

import pytest
import torch

from megatron_dagger.config import ConfigError
from megatron_dagger.weights.errors import WeightSyncError
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.open import open_transport
from tests.unit.weights.transfers import (
    CPU,
    KINDS,
    SINGLE,
    TRAINER_KINDS,
    assert_equal,
    model_and_tensors,
    new_source,
    transfer,
)

SOURCES = {
    "one": SINGLE,
    "tp2": replace(SINGLE, tensor_model_parallel_size=2),
    "pp2-dp2": replace(SINGLE, pipeline_model_parallel_size=2, data_parallel_size=2),
}
TARGETS = {
    "one": TargetLayout(),
    "tp2": TargetLayout(tensor_parallel_size=2),
    "tp4-replicas2": TargetLayout(tensor_parallel_size=4, replicas=2),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_target_rank_gets_its_parameters(kind, layout, target, tmp_path):
    model, tensors = model_and_tensors(tied=layout != "tp2")
    source = new_source(kind, tmp_path, SOURCES[layout], model, tensors)
    spec = TransferSpec(model=model, target=TARGETS[target], dtype="float32", source=source)
    assert_equal(*transfer(spec, model, tensors))
    assert not list(tmp_path.rglob("*.sock")), "nothing is left behind"


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_experts_are_sent_and_cast_to_the_engines_dtype(kind, tmp_path):
    model, tensors = model_and_tensors("qwen3_moe")
    layout = replace(SINGLE, tensor_model_parallel_size=2, data_parallel_size=2, expert_model_parallel_size=2)
    target = TargetLayout(tensor_parallel_size=2, enable_expert_parallel=True)
    source = new_source(kind, tmp_path, layout, model, tensors)
    spec = TransferSpec(model=model, target=target, dtype="bfloat16", source=source)
    assert_equal(*transfer(spec, model, tensors, torch.bfloat16))


@pytest.mark.parametrize("kind", TRAINER_KINDS)
def test_addresses_are_unique(kind, tmp_path):
    model, tensors = model_and_tensors()
    sources = [new_source(kind, tmp_path, SINGLE, model, tensors) for _ in range(2)]
    assert sources[0].address != sources[1].address


def test_a_checkpoint_of_another_dtype_is_refused(tmp_path):
    model, tensors = model_and_tensors()
    source = new_source("checkpoint", tmp_path, SINGLE, model, tensors)
    spec = TransferSpec(model=model, target=TargetLayout(), dtype="bfloat16", source=source)
    with pytest.raises(
        WeightSyncError, match=r"holds float32, but the engine needs bfloat16: set rollout\.engine\.dtype"
    ):
        open_transport(spec, 0, CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "rdma"}, r"source\.kind='rdma': choose one of checkpoint, shared_memory, p2p"),
        ({"bucket_mib": 0}, "bucket_mib must be positive"),
        ({"deadline_s": 0.0}, "deadline_s must be positive"),
        (
            {"kind": "checkpoint", "layout": replace(SINGLE, data_parallel_size=2)},
            "single rank, got a layout of 2 ranks",
        ),
    ],
)
def test_an_invalid_source_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        WeightSource(**{"kind": "shared_memory", "address": "x", "layout": SINGLE, **settings})
