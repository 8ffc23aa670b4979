"""Transfers inside a test process: models, sources of every kind, and the ranks of trainer and engine as threads."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

from megatron_dagger.weights import families
from megatron_dagger.weights.layouts import SourceLayout
from megatron_dagger.weights.transports import TRANSPORTS, WeightSource, checkpoint_source
from megatron_dagger.weights.transports.open import open_transport, send_weights, transport_module
from tests.unit.weights.naive_shards import canonical_tensors, megatron_ranks, vllm_ranks
from tests.unit.weights.sample_models import PADDED, VOCAB, sample_model

CPU = torch.device("cpu")
SINGLE = SourceLayout(padded_vocab_size=PADDED)
KINDS = tuple(TRANSPORTS)
TRAINER_KINDS = tuple(kind for kind, transport in TRANSPORTS.items() if transport.from_trainer)


def model_and_tensors(family="qwen3", tied=True):
    """Return a model, and canonical tensors of small whole numbers, which float32 and bfloat16 hold exactly."""
    moe = {"num_moe_experts": 8, "moe_ffn_hidden_size": 8} if family == "qwen3_moe" else {}
    model = sample_model(family, num_query_groups=2, vocab_size=VOCAB, tie_embeddings=tied, **moe)
    tensors = canonical_tensors(model, families.canonical_names(model))
    return model, {name: (1 + array % 199).astype(np.float32) for name, array in tensors.items()}


def as_torch(rank, dtype=torch.float32):
    """Return a naive rank's arrays in the trainer's form, in which every local expert has its own tensor."""
    tensors = {}
    for name, array in rank.items():
        parts = [(name.format(i), part) for i, part in enumerate(array)] if "{}" in name else [(name, array)]
        tensors |= {key: torch.from_numpy(np.ascontiguousarray(part)).to(dtype) for key, part in parts}
    return tensors


def save_checkpoint(directory, model, tensors, dtype=torch.float32):
    """Write a checkpoint in Megatron's form, with the layers stacked."""
    stacked = {}
    for name, tensor in as_torch(megatron_ranks(model, SINGLE, tensors)[0], dtype).items():
        head, _, rest = name.rpartition("layers.")
        stacked.setdefault(f"{head}layers.{rest.partition('.')[2]}" if head else name, []).append(tensor)
    state = {key: torch.stack(parts) if "layers." in key else parts[0] for key, parts in stacked.items()}
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)


def new_source(kind, directory, layout, model, tensors, **settings):
    """Return a source of this kind; a checkpoint is written to ``directory``."""
    if kind == "checkpoint":
        save_checkpoint(directory, model, tensors)
        return replace(checkpoint_source(directory, model), **settings)
    address = transport_module(kind).new_address("127.0.0.1", directory)
    return WeightSource(kind=kind, address=address, layout=layout, **{"deadline_s": 20.0, **settings})


def transfer(spec, model, tensors, dtype=torch.float32):
    """Transfer with all ranks of trainer and engine at once; return the received and the expected arrays."""
    expected = vllm_ranks(model, spec.target, tensors)
    source_ranks = megatron_ranks(model, spec.source.layout, tensors)
    senders = [as_torch(rank) for rank in source_ranks] if spec.source.from_trainer else []
    with ThreadPoolExecutor(len(senders) + len(expected)) as pool:
        sending = [pool.submit(send_weights, spec, rank, own, CPU) for rank, own in enumerate(senders)]
        receiving = [
            pool.submit(receive, spec, rank, {name: array.shape for name, array in expected[rank].items()}, dtype)
            for rank in range(len(expected))
        ]
        received = [future.result() for future in receiving]
        for future in sending:
            future.result()
    return received, expected


def receive(spec, rank, shapes, dtype=torch.float32):
    """Return a target rank's parameters after a transfer."""
    received = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}
    with open_transport(spec, rank, CPU) as transport:
        for copy, block in transport.receive(spec.plan.by_target[rank]):
            assert block.shape == copy.target.shape and block.nbytes <= spec.bucket_spec.bucket_bytes
            received[copy.target_parameter][copy.target.slices] = block
    return received


def assert_equal(received, expected):
    for rank, parameters in enumerate(expected):
        for name, array in parameters.items():
            assert np.array_equal(received[rank][name].float().numpy(), array), (rank, name)
