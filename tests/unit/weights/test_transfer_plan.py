"""Plans executed on small arrays, and compared with the naively computed shards of trainer and engine."""

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.config import ConfigError, ModelConfig
from megatron_dagger.weights import families
from megatron_dagger.weights.blocks import ShardDim
from megatron_dagger.weights.layouts import SourceLayout, TargetLayout
from megatron_dagger.weights.transfer_plan import plan
from tests.unit.weights.naive_shards import canonical_tensors, megatron_ranks, vllm_ranks
from tests.unit.weights.sample_models import FAMILIES, VOCAB, sample_model, sources, targets

MOE = {"num_moe_experts": 24, "moe_ffn_hidden_size": 24}
ITEMSIZE = 4


def check(model, source, target, source_tensors, expected):
    """Execute the plan on the source ranks' tensors, and compare the result with the ``expected`` parameters."""
    result = plan(model, source, target)
    assert (source.world_size, target.world_size) == (len(source_tensors), len(expected))
    received = [{name: np.full(array.shape, -2, array.dtype) for name, array in rank.items()} for rank in expected]
    writes = [{name: np.zeros(array.shape, np.int8) for name, array in rank.items()} for rank in expected]
    for copy in result.copies:
        block = source_tensors[copy.source_rank][copy.source_tensor][copy.source.slices]
        assert block.shape == copy.source.shape == copy.target.shape
        received[copy.target_rank][copy.target_parameter][copy.target.slices] = block
        writes[copy.target_rank][copy.target_parameter][copy.target.slices] += 1
    for fill in result.fills:
        received[fill.target_rank][fill.target_parameter][fill.target.slices] = 0
        writes[fill.target_rank][fill.target_parameter][fill.target.slices] += 1
    for rank, parameters in enumerate(expected):
        for name, array in parameters.items():
            assert (writes[rank][name] == 1).all(), (rank, name)
            assert np.array_equal(received[rank][name], array), (rank, name)
    # only padding is 0
    minimum = sum(np.count_nonzero(array) for rank in expected for array in rank.values()) * ITEMSIZE
    assert result.bytes_moved(ITEMSIZE) == result.minimum_bytes(ITEMSIZE) == minimum
    return result


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_is_written_once_over_the_whole_matrix(family, groups, tied):
    experts = family == "qwen3_moe"
    model = sample_model(
        family,
        num_layers=4,
        num_attention_heads=24,
        num_query_groups=groups,
        vocab_size=VOCAB,
        ffn_hidden_size=24,
        tie_embeddings=tied,
        **(MOE if experts else {}),
    )
    tensors = canonical_tensors(model, families.canonical_names(model))
    expected_by_target = [(target, vllm_ranks(model, target, tensors)) for target in targets(groups, experts)]
    for source in sources(groups, experts):
        source_tensors = megatron_ranks(model, source, tensors)
        for target, expected in expected_by_target:
            check(model, source, target, source_tensors, expected)


@st.composite
def cases(draw):
    """Draw a model of any family and two layouts that fit it."""
    small = st.integers(1, 3)
    family, head = draw(st.sampled_from(FAMILIES)), 2 * draw(small)
    tp, pp, dp, target_tp = draw(small), draw(small), draw(small), draw(st.sampled_from([1, 2, 4, 8]))
    vp = draw(small) if pp > 1 else 1
    groups = tp * draw(small)
    if groups % target_tp and target_tp % groups:
        target_tp = 1
    heads = groups * target_tp
    experts, dims = {}, {}
    source, target = {}, {"tensor_parallel_size": target_tp, "replicas": draw(small)}
    if family == "qwen3_moe":
        etp = draw(st.sampled_from([1, tp]))
        ep = draw(st.sampled_from([n for n in range(1, tp * dp // etp + 1) if tp * dp // etp % n == 0]))
        target |= {"data_parallel_size": draw(small), "enable_expert_parallel": draw(st.booleans())}
        ranks = target_tp * target["data_parallel_size"]
        experts = {"num_moe_experts": ep * ranks * draw(st.integers(1, 2)), "moe_router_topk": 1}
        experts["moe_ffn_hidden_size"] = etp * ranks * draw(st.integers(1, 2))
        source = {"expert_tensor_parallel_size": etp, "expert_model_parallel_size": ep}
    if family in ("qwen3", "qwen3_moe"):
        dims = {"hidden_size": draw(st.integers(1, 7))}
    vocab = draw(st.integers(1, 200))
    model = sample_model(
        family,
        num_layers=pp * vp * draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=head,
        ffn_hidden_size=tp * target_tp * draw(small),
        vocab_size=vocab,
        tie_embeddings=draw(st.booleans()),
        **dims,
        **experts,
    )
    source |= {
        "padded_vocab_size": -(-vocab // tp) * tp + tp * draw(st.integers(0, 20)),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp,
        "data_parallel_size": dp,
        "context_parallel_size": 1 if family == "qwen3_moe" else draw(st.integers(1, 2)),
    }
    return model, SourceLayout(**source), TargetLayout(**target)


@settings(max_examples=60, deadline=None)
@given(case=cases(), seed=st.integers(0, 99))
def test_every_element_is_written_once_in_any_layout(case, seed):
    model, source, target = case
    tensors = canonical_tensors(model, families.canonical_names(model), seed)
    check(model, source, target, megatron_ranks(model, source, tensors), vllm_ranks(model, target, tensors))


@pytest.mark.parametrize("family", FAMILIES)
def test_replicas_send_the_same_amount_of_data(family):
    model = sample_model(family, num_layers=6, tie_embeddings=True)
    source = SourceLayout(
        padded_vocab_size=128, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, data_parallel_size=4
    )
    result = plan(model, source, TargetLayout(tensor_parallel_size=2, replicas=8))
    sent = {rank: sum(copy.source.elements for copy in copies) for rank, copies in result.by_source.items()}
    largest = max(copy.source.elements for copy in result.copies)
    for stage, tensor_rank in itertools.product(range(2), range(2)):
        replicas = [sent[stage * 8 + replica * 2 + tensor_rank] for replica in range(4)]
        assert max(replicas) - min(replicas) <= largest


def test_the_last_stages_copy_of_a_tied_embedding_is_a_source_too():
    model = sample_model("llama", num_layers=2, vocab_size=6400, tie_embeddings=True)
    source = SourceLayout(padded_vocab_size=6400, pipeline_model_parallel_size=2)
    copies = plan(model, source, TargetLayout(replicas=2)).copies
    embedding = {(c.source_rank, c.source_tensor) for c in copies if c.target_parameter == "model.embed_tokens.weight"}
    assert embedding == {(0, "embedding.word_embeddings.weight"), (1, "output_layer.weight")}


def test_rows_that_are_adjacent_in_trainer_and_engine_are_a_single_copy():
    """With a single KV head QKV has the same order on both sides, as gate and up always do; experts are stacked."""
    model = sample_model("qwen3_moe", num_query_groups=1, vocab_size=128)
    result = plan(model, SourceLayout(padded_vocab_size=128), TargetLayout())
    assert len(result.copies) == len(families.lookup(model).vllm(model))
    assert result.fills == ()


def test_views_by_rank_hold_every_copy_once():
    model = sample_model("qwen2")
    source = SourceLayout(padded_vocab_size=128, tensor_model_parallel_size=2)
    result = plan(model, source, TargetLayout(replicas=3))
    for view, key in ((result.by_source, "source_rank"), (result.by_target, "target_rank")):
        assert sum(map(len, view.values())) == len(result.copies)
        assert all(getattr(copy, key) == rank for rank, copies in view.items() for copy in copies)


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "dp", "ep", "etp"),
    [(2, 2, 2, 4, 2, None), (2, 1, 2, 8, 4, 1), (4, 1, 3, 2, 2, 2), (1, 2, 1, 2, 4, 1), (2, 1, 4, 3, 3, None)],
)
def test_ranks_are_ordered_as_in_megatron(tp, cp, pp, dp, ep, etp):
    state = pytest.importorskip("megatron.core.parallel_state", reason="Megatron-Core is not installed")
    source = SourceLayout(
        padded_vocab_size=8,
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        data_parallel_size=dp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    order, etp = "tp-cp-ep-dp-pp", etp or tp
    dense = state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    experts = state.RankGenerator(tp=etp, ep=ep, dp=tp * cp * dp // (etp * ep), pp=pp, cp=1, order=order)
    assert dense.world_size == experts.world_size == source.world_size
    for tensor, generator, replicas, shards in (
        (families.MegatronTensor(parts=(), shard_dim=ShardDim.ROWS), dense, "cp-dp", "tp"),
        (families.MegatronTensor(parts=(), experts=1), experts, "dp", "tp-ep"),
        (families.MegatronTensor(parts=()), dense, "tp-cp-dp", None),
    ):
        holders = [[ranks for _, ranks in source.holders(tensor, stage)] for stage in range(pp)]
        assert [list(ranks) for stage in holders for ranks in stage] == generator.get_ranks(replicas)
        if shards:
            together = [list(ranks) for stage in holders for ranks in zip(*stage, strict=True)]
            assert together == generator.get_ranks(shards)


def test_virtual_stages_take_layers_in_turn():
    """Megatron's own example: 8 layers, 2 stages, 2 model chunks each (transformer_block.py)."""
    source = SourceLayout(padded_vocab_size=8, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)
    model = sample_model("llama", num_layers=8)
    stages = [source.stage(f"decoder.layers.{i}.mlp.linear_fc2.weight", model) for i in range(8)]
    assert stages == [0, 0, 1, 1, 0, 0, 1, 1]
    assert source.stage("embedding.word_embeddings.weight", model) == 0
    assert source.stage("decoder.final_layernorm.weight", model) == source.stage("output_layer.weight", model) == 1


@pytest.mark.parametrize(
    ("family", "settings", "source", "target", "message"),
    [
        ("llama", {}, {"tensor_model_parallel_size": 4}, {}, "query groups of 'model.layers.0.*q_proj.weight': 2 .* 4"),
        ("llama", {"ffn_hidden_size": 9}, {"tensor_model_parallel_size": 2}, {}, "rows of .*gate_proj.weight': 9"),
        ("llama", {}, {"padded_vocab_size": 127, "tensor_model_parallel_size": 2}, {}, "embed_tokens.weight': 127"),
        ("llama", {}, {"padded_vocab_size": 64}, {}, "embed_tokens.weight' has 70 rows, more than the 64"),
        ("llama", {}, {"pipeline_model_parallel_size": 4}, {}, "num_layers=2 cannot be split evenly over 4"),
        ("llama", {}, {"virtual_pipeline_model_parallel_size": 2}, {}, "needs pipeline_model_parallel_size > 1"),
        ("llama", {}, {"data_parallel_size": 2, "expert_model_parallel_size": 2}, {}, "family llama has no experts"),
        ("qwen3_moe", {}, {"expert_model_parallel_size": 2}, {}, "does not divide the 1 ranks"),
        ("qwen3_moe", {}, {"data_parallel_size": 3, "expert_model_parallel_size": 3}, {}, "experts .*: 4 .* 3"),
        ("llama", {}, {}, {"tensor_parallel_size": 8}, "heads of .*q_proj.weight': 4 cannot be split into 8"),
        (
            "llama",
            {"num_attention_heads": 6, "vocab_size": 192},
            {},
            {"tensor_parallel_size": 3},
            "share the heads .*k_proj",
        ),
        ("llama", {"num_attention_heads": 6}, {}, {"tensor_parallel_size": 3}, "embed_tokens.weight': 128 .* 3"),
        ("llama", {}, {}, {"enable_expert_parallel": True}, "family llama has no experts"),
        ("qwen3_moe", {}, {}, {"data_parallel_size": 3, "enable_expert_parallel": True}, "experts .*: 4 .* 3"),
        ("qwen3_moe", {"num_moe_experts": 2}, {}, {"tensor_parallel_size": 4}, "more than model.num_moe_experts=2"),
    ],
)
def test_a_model_that_does_not_fit_the_layout_is_an_error_that_names_the_cause(
    family, settings, source, target, message
):
    model = sample_model(family, **settings)
    with pytest.raises((ConfigError, families.WeightMapError), match=message):
        plan(model, SourceLayout(**{"padded_vocab_size": 192} | source), TargetLayout(**target))


@pytest.mark.parametrize("side", ["megatron", "vllm"])
def test_a_tensor_that_only_trainer_or_engine_has_is_named(side, monkeypatch):
    model, entry = sample_model("qwen3"), families.WEIGHT_MAPS["qwen3"]
    table = dict(getattr(entry, side)(model))
    del table["decoder.final_layernorm.weight" if side == "megatron" else "model.norm.weight"]
    monkeypatch.setitem(families.WEIGHT_MAPS, "qwen3", replace(entry, **{side: lambda _: table}))
    with pytest.raises(families.WeightMapError, match=r"'model\.norm\.weight'"):
        plan(model, SourceLayout(padded_vocab_size=128), TargetLayout())


def test_planning_qwen3_235b_a22b_takes_seconds():
    """Plan transfers from 64 ranks to 32. The times are printed (``pytest -s``), not asserted."""
    model = ModelConfig(
        family="qwen3_moe",
        num_layers=94,
        hidden_size=4096,
        num_attention_heads=64,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=151936,
        num_moe_experts=128,
        moe_ffn_hidden_size=1536,
        moe_router_topk=8,
        tie_embeddings=False,
    )
    source = SourceLayout(
        padded_vocab_size=151936,
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=2,
        data_parallel_size=8,
        expert_model_parallel_size=8,
    )
    for target in (
        TargetLayout(tensor_parallel_size=8, enable_expert_parallel=True, replicas=4),
        TargetLayout(tensor_parallel_size=8, replicas=4),
        TargetLayout(tensor_parallel_size=4, data_parallel_size=8, enable_expert_parallel=True),
    ):
        start = time.process_time()
        result = plan(model, source, target)
        seconds = time.process_time() - start
        sent = [sum(copy.source.elements for copy in copies) * 2 for copies in result.by_source.values()]
        print(
            f"\n{target}: {seconds:.1f} s, {len(result.copies)} copies, {result.bytes_moved(2) / 1e9:.0f} GB in bf16, "
            f"{min(sent) / 1e9:.2f} to {max(sent) / 1e9:.2f} GB from each of {len(sent)} ranks"
        )
        assert result.bytes_moved(2) == result.minimum_bytes(2)
        assert len(sent) == source.world_size
