"""Digests cover dtype, shape, values and their positions; the shares of any layout add up to the same digest."""

import pytest
import torch
import xxhash

from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import Block, Box
from megatron_dagger.weights.errors import WeightMapError
from megatron_dagger.weights.verify.digest import canonical_digests, compare, digest_shares, merge
from megatron_dagger.weights.verify.digest_pool import DigestPool
from megatron_dagger.weights.verify.hash_tiles import hash_tiles
from tests.unit.weights.naive_shards import canonical_tensors, megatron_ranks, vllm_ranks
from tests.unit.weights.sample_models import FAMILIES, PADDED, VOCAB, sample_model, sources, targets

MODEL = sample_model("qwen3", num_query_groups=2)
EMBEDDING, DOWN, QUERY, NORM = (
    "model.embed_tokens.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
)


def digest(name, tensor):
    return canonical_digests([(name, tensor)], MODEL)[name]


def test_a_digest_is_the_sum_of_its_tiles_hashes():
    query = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    heads = [xxhash.xxh3_64_intdigest(query[2 * h : 2 * h + 2].numpy().tobytes(), seed=h) for h in range(4)]
    assert digest(QUERY, query) == f"float32 (8, 8) {sum(heads) % 2**64:016x}"
    columns = [xxhash.xxh3_64_intdigest(query[:, c : c + 1].numpy().tobytes(), seed=c) for c in range(8)]
    assert digest(DOWN, query) == f"float32 (8, 8) {sum(columns) % 2**64:016x}"
    assert digest(DOWN, query.numpy()) == digest(DOWN, query)


@pytest.mark.parametrize("tiles_per_portion", [0.5, 1, 3.5])
def test_the_digest_does_not_depend_on_the_size_of_the_fetched_portions(monkeypatch, tiles_per_portion):
    embedding = torch.randn(MODEL.vocab_size, 8)
    rows = range(0, MODEL.vocab_size, 4)
    hashes = [xxhash.xxh3_64_intdigest(embedding[r : r + 4].numpy().tobytes(), seed=r // 4) for r in rows]
    assert len(hashes) > 4
    portion_bytes = int(tiles_per_portion * embedding[:4].nbytes)
    monkeypatch.setattr("megatron_dagger.weights.verify.digest._PORTION_BYTES", portion_bytes)
    expected = f"float32 ({MODEL.vocab_size}, 8) {sum(hashes) % 2**64:016x}"
    assert digest(EMBEDDING, embedding) == digest(EMBEDDING, embedding.numpy()) == expected


def test_a_pool_computes_the_same_digests_and_raises_the_same_errors():
    tensors = {name: torch.randn(shape) for name, shape in families.canonical_names(MODEL).items()}
    with DigestPool(MODEL) as pool:
        for name, tensor in tensors.items():
            whole = Box((0,) * tensor.dim(), tuple(tensor.shape))
            pool.add([Block(name, whole, whole.start)], tensor)
        assert merge([pool.finish()], MODEL) == canonical_digests(tensors.items(), MODEL)
        pool.add([Block(QUERY, Box((1, 0), (2, 8)), (0, 0))], tensors[QUERY])
        with pytest.raises(WeightMapError, match="cuts a tile"):
            pool.finish()


def test_the_digest_does_not_depend_on_strides_and_storage():
    tensor = torch.arange(64, dtype=torch.bfloat16).reshape(8, 8)
    assert digest(DOWN, tensor.t().contiguous().t()) == digest(DOWN, tensor)
    assert digest(DOWN, torch.nn.Parameter(tensor)) == digest(DOWN, tensor)
    assert digest(DOWN, torch.cat([tensor, tensor])[:8]) == digest(DOWN, tensor)


def test_dtype_values_and_their_positions_change_the_digest():
    tensor = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    variants = [tensor.to(torch.bfloat16), tensor.t(), tensor.flip(0), tensor.flip(1), tensor.clone()]
    variants[-1][7, 3] += 1e-5
    for name in (QUERY, DOWN):
        assert len({digest(name, variant) for variant in [tensor, *variants]}) == 6


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_any_layout_of_trainer_or_engine_add_up_to_the_digests(family, groups):
    experts = family == "qwen3_moe"
    sizes = {"num_attention_heads": 24, "num_query_groups": groups, "ffn_hidden_size": 24, "vocab_size": VOCAB}
    moe = {"num_moe_experts": 24, "moe_ffn_hidden_size": 24} if experts else {}
    model = sample_model(family, num_layers=4, **sizes, **moe)
    tensors = canonical_tensors(model, families.canonical_names(model))
    expected = canonical_digests(tensors.items(), model)
    assert list(expected) == list(tensors)
    for source in sources(groups, experts):
        shards = megatron_ranks(model, source, tensors)
        ranks: list = [{} for _ in shards]
        for name, entry in families.lookup(model).megatron(model).items():
            for shard, holders in source.holders(entry, source.stage(name, model)):
                blocks = entry.blocks(shard, padded_rows=PADDED)
                for rank in holders:
                    ranks[rank] |= digest_shares(blocks, shards[rank][name], model)
        assert compare(expected, merge(ranks, model)) is None, source
    for target in targets(groups, experts):
        shards = vllm_ranks(model, target, tensors)
        ranks = [{} for _ in shards]
        for name, parameter in families.lookup(model).vllm(model).items():
            for shard, holders in target.holders(experts=experts and parameter.experts > 0):
                for rank in holders:
                    ranks[rank] |= digest_shares(parameter.blocks(shard), shards[rank][name], model)
        assert compare(expected, merge(ranks, model)) is None, target


def shares_of(name, tensor, first=0, rows=None):
    part = tensor[first : first + rows] if rows else tensor
    box = Box((first, *[0] * (part.ndim - 1)), tuple(part.shape))
    return digest_shares([Block(name, box, (0,) * part.ndim)], part, MODEL)


def test_ranks_with_different_or_missing_shares_are_named():
    query = torch.randn(8, 8)
    upper, lower = shares_of(QUERY, query, 0, 4), shares_of(QUERY, query, 4, 4)
    assert merge([upper, lower], MODEL)[QUERY] == digest(QUERY, query)
    with pytest.raises(WeightMapError, match=r"no rank holds tile 2 of the 4 of tensor .*q_proj"):
        merge([upper], MODEL)
    with pytest.raises(WeightMapError, match="overlapping shares"):
        merge([shares_of(QUERY, query), lower], MODEL)
    with pytest.raises(WeightMapError, match=r"ranks 0 and 2 hold different copies of tensor .*q_proj"):
        merge([upper, lower, shares_of(QUERY, query + 1, 0, 4)], MODEL)
    with pytest.raises(WeightMapError, match="float32 on one rank and bfloat16 on rank 1"):
        merge([upper, shares_of(QUERY, query.bfloat16(), 4, 4)], MODEL)
    with pytest.raises(WeightMapError, match=r"q_proj.*from 0 to 3 cuts a tile of 2"):
        shares_of(QUERY, query, 0, 3)
    with pytest.raises(ValueError, match="occurs twice"):
        canonical_digests([(NORM, torch.zeros(8)), (NORM, torch.zeros(8))], MODEL)


def test_a_difference_is_named():
    sent = canonical_digests([(NORM, torch.zeros(8)), (DOWN, torch.ones(8, 8))], MODEL)
    assert compare(sent, dict(sent)) is None
    assert "down_proj.weight' differs: sent float32 (8, 8)" in (compare(sent, {**sent, DOWN: sent[NORM]}) or "")
    assert "was not received" in (compare(sent, {NORM: sent[NORM]}) or "")
    assert "'c' was received but never sent" in (compare(sent, {**sent, "c": sent[NORM]}) or "")


def test_the_sizes_of_a_common_model_divide_into_32_tiles():
    model = sample_model("qwen3", ffn_hidden_size=9728, vocab_size=151_936, num_attention_heads=32, num_query_groups=8)
    table = hash_tiles(model)
    assert table[DOWN].count == 32 and table[QUERY].count == 32
    assert table["model.embed_tokens.weight"].count == 151_936 // 4
