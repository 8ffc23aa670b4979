"""Block-wise FP8: against a naive reference, from shards of a matrix, and over every transport."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_dagger.weights.blocks import Box, Shard
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.families import canonical_names, lookup
from megatron_dagger.weights.families.fp8 import is_quantised, scales_name, vllm_table
from megatron_dagger.weights.layouts import TargetLayout
from megatron_dagger.weights.quantise import BlockScales, fold_maxima, quantise, quantise_matrix, scales_of
from megatron_dagger.weights.transfer_plan import plan
from megatron_dagger.weights.transports import TransferSpec, WeightSource
from megatron_dagger.weights.transports.open import open_transport, send_weights
from megatron_dagger.weights.verify.digest import canonical_digests, compare, digest_shares, digest_whole, merge
from tests.unit.weights.fp8_tensors import dequantised, quantised, without_scales
from tests.unit.weights.naive_shards import megatron_ranks, vllm_ranks
from tests.unit.weights.sample_models import VOCAB, sample_model
from tests.unit.weights.transfers import CPU, KINDS, SINGLE, as_torch, new_source

# Each of four trainer ranks has 64 rows of a projection: half a block. The hidden size is not a multiple of 128.
SHAPE = {"num_query_groups": 4, "num_attention_heads": 8, "kv_channels": 64, "hidden_size": 72, "ffn_hidden_size": 256}
SOURCES = {
    "one": SINGLE,
    "tp2-pp2": replace(SINGLE, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "tp4": replace(SINGLE, tensor_model_parallel_size=4),
}
TARGETS = {"one": TargetLayout(), "tp2-replicas2": TargetLayout(tensor_parallel_size=2, replicas=2)}


def e4m3_values():
    """Return all finite non-negative values of e4m3 (OFP8): 4 exponent bits, bias 7, 3 mantissa bits, no infinities."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def naive(matrix):
    """Quantise block by block and value by value, in float64 except for the scale and the quotient."""
    table, (rows, columns) = e4m3_values(), matrix.shape
    values, scales = np.empty_like(matrix, dtype=np.float64), np.empty((-(-rows // 128), -(-columns // 128)))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = matrix[i : i + 128, j : j + 128]
            scale = np.abs(block).max() / np.float32(448)
            scales[i // 128, j // 128] = scale
            quotients = np.abs(block / scale).astype(np.float64)
            above = np.searchsorted(table, np.minimum(quotients, 448))
            below = np.maximum(above - 1, 0)
            to_above, to_below = table[above] - quotients, quotients - table[below]
            even = above % 2 == 0  # ties go to the even mantissa
            nearest = np.where((to_above < to_below) | ((to_above == to_below) & even), above, below)
            values[i : i + 128, j : j + 128] = np.sign(block) * table[nearest]
    return values, scales


@pytest.mark.parametrize("shape", [(128, 128), (300, 200), (1, 130), (129, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_quantised_like_the_naive_reference(shape, dtype):
    generator = torch.Generator().manual_seed(3)
    matrix = (torch.randn(shape, generator=generator) * 10 ** torch.randn(shape, generator=generator)).to(dtype)
    values, scales = quantise_matrix(matrix)
    expected, expected_scales = naive(matrix.float().numpy())
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert np.array_equal(scales.numpy(), expected_scales.astype(np.float32))
    assert np.array_equal(values.float().numpy(), expected)


def test_zeros_and_the_largest_value_survive():
    values, scales = quantise_matrix(torch.zeros(4, 4))
    assert not values.float().any() and torch.isfinite(scales).all()
    matrix = torch.full((130, 3), 1e30)
    values, scales = quantise_matrix(matrix)
    assert torch.equal(values.float(), torch.full((130, 3), 448.0))


def test_quantising_parts_equals_quantising_the_matrix():
    matrix = torch.randn(300, 290, generator=torch.Generator().manual_seed(1))
    rows, columns = (0, 1, 64, 200, 300), (0, 127, 129, 290)
    boxes = [Box((r, c), (r2 - r, c2 - c)) for r, r2 in pairwise(rows) for c, c2 in pairwise(columns)]
    maxima = torch.zeros(3, 3)
    for box in boxes:
        fold_maxima(maxima, matrix[box.slices], box)
    values, scales = quantise_matrix(matrix)
    assert torch.equal(scales_of(maxima), scales)
    for box in boxes:
        assert torch.equal(quantise(matrix[box.slices], scales, box).float(), values.float()[box.slices])


def model_and_tensors(**shape):
    model = sample_model("qwen3", vocab_size=VOCAB, **{**SHAPE, **shape})
    generator = np.random.default_rng(5)
    tensors = {
        name: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).bfloat16().float().numpy()
        for name, shape in canonical_names(model).items()
    }
    return model, tensors


def own_blocks(model, layout, rank_tensors, rank):
    shard = Shard(rank=rank % layout.tensor_model_parallel_size, size=layout.tensor_model_parallel_size)
    for name, tensor in rank_tensors.items():
        if name != "output_layer.weight" or not model.tie_embeddings:
            blocks = lookup(model).megatron_tensor(name, model).blocks(shard, padded_rows=layout.padded_vocab_size)
            yield blocks, tensor


def agreed_scales(model, layout, ranks):
    """Return each rank's scales, after the all-reduce that the trainer does."""
    by_rank = [BlockScales(model, CPU) for _ in ranks]
    for rank, (scales, tensors) in enumerate(zip(by_rank, ranks, strict=True)):
        for blocks, tensor in own_blocks(model, layout, tensors, rank):
            scales.add(blocks, tensor)
    maxima = torch.stack([scales.maxima for scales in by_rank]).amax(0)
    for scales in by_rank:
        scales.maxima.copy_(maxima)
        scales.finish()
    return by_rank


def receive(spec, rank):
    """Return a target rank's parameters after a transfer, and its shares of their digests."""
    table, dtypes = vllm_table(spec.model, "fp8"), spec.bucket_spec.dtypes
    shards = {name: spec.target.shard(rank, experts=False) for name in table}
    received = {n: torch.zeros(p.shape(shards[n]), dtype=getattr(torch, dtypes[n])) for n, p in table.items()}
    with open_transport(spec, rank, CPU) as transport:
        for copy, block in transport.receive(spec.plan.by_target[rank]):
            assert block.nbytes <= spec.bucket_spec.bucket_bytes
            received[copy.target_parameter][copy.target.slices].copy_(block)
    shares = {}
    for name, parameter in table.items():
        shares |= digest_shares(parameter.blocks(shards[name]), received[name], spec.model)
    return received, shares


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_gets_the_values_and_scales_of_the_full_tensors(kind, layout, target, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightSource, "bucket_bytes", 10_000)  # copies are split within blocks
    (model, tensors), layout = model_and_tensors(tie_embeddings=layout == "one"), SOURCES[layout]
    source = new_source(kind, tmp_path, layout, model, tensors)
    spec = TransferSpec(model=model, target=TARGETS[target], dtype="float32", source=source, quantization="fp8")
    ranks = [as_torch(rank) for rank in megatron_ranks(model, layout, tensors)]
    scales = agreed_scales(model, layout, ranks)
    sent = [r | s.tensors() for r, s in zip(ranks, scales, strict=True)] if source.from_trainer else []
    with ThreadPoolExecutor(8) as pool:
        sending = [pool.submit(send_weights, spec, rank, own, CPU) for rank, own in enumerate(sent)]
        results = list(pool.map(lambda rank: receive(spec, rank), range(spec.target.world_size)))
        for future in sending:
            future.result()

    canonical = quantised(model, ((name, torch.from_numpy(array)) for name, array in tensors.items()))
    restored = {name: tensor.numpy() for name, tensor in without_scales(canonical).items()}
    for (received, _), expected in zip(results, vllm_ranks(model, spec.target, restored), strict=True):
        for name, array in expected.items():
            actual = received[name].float().numpy()
            if scales_name(name) in received:
                actual = dequantised(received[name], received[scales_name(name)]).numpy()
            assert np.array_equal(actual, array), name

    expected_digests = canonical_digests(canonical.items(), model)
    assert compare(expected_digests, merge([shares for _, shares in results], model)) is None
    trainer_shares = [
        {
            n: s
            for blocks, t in own_blocks(model, layout, ranks[r], r)
            for n, s in digest_shares(blocks, scales[r].quantised(blocks, t), model).items()
        }
        for r in range(len(ranks))
    ]
    assert merge([*trainer_shares, digest_whole(scales[0].canonical().items(), model)], model) == expected_digests


def test_fp8_sends_half_the_bytes_of_bfloat16():
    model, _ = model_and_tensors(hidden_size=512, num_layers=2)
    spec = TransferSpec(
        model=model,
        target=TargetLayout(),
        dtype="bfloat16",
        source=WeightSource(kind="shared_memory", address="x", layout=SINGLE),
        quantization="fp8",
    )
    linear = sum(np.prod(p.shape(Shard())) for p in lookup(model).vllm(model).values() if is_quantised(p))
    moved = sum(map(spec.bucket_spec.bytes, spec.plan.copies))
    rest = spec.plan.minimum_elements - linear - linear // 128**2
    assert moved == linear + 4 * (linear // 128**2) + 2 * rest


def test_a_shard_that_ends_within_a_block_is_refused():
    model, _ = model_and_tensors()
    with pytest.raises(
        WeightMapError, match=r"'model\.layers\.0\.self_attn\.qkv_proj\.weight': elements 0 to 64 of .*k_proj"
    ):
        plan(model, SINGLE, TargetLayout(tensor_parallel_size=4), "fp8")
    model, _ = model_and_tensors(ffn_hidden_size=192)
    with pytest.raises(WeightMapError, match=r"gate_up_proj.*not whole FP8 blocks of 128"):
        plan(model, SINGLE, TargetLayout(), "fp8")


def test_experts_are_refused():
    model = sample_model("qwen3_moe")
    with pytest.raises(WeightMapError, match=r"experts cannot be quantised.*rollout\.engine\.quantization=none"):
        plan(model, SINGLE, TargetLayout(), "fp8")
