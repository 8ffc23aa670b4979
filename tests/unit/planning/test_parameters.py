"""Parameter counts against published sizes and against sums over ranks."""

import pytest

from megatron_dagger.config import ModelConfig, ParallelConfig
from megatron_dagger.planning.parameters import (
    active_parameters,
    dense_matrices,
    layer_experts,
    rank_parameters,
    total_parameters,
    worker_parameters,
)
from megatron_dagger.recipes.qwen3 import QWEN3_4B, QWEN3_8B, QWEN3_30B_A3B
from megatron_dagger.recipes.smollm2 import SMOLLM2_135M

LLAMA_3_8B = ModelConfig(
    family="llama",
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128_256,
    tie_embeddings=False,
)


@pytest.mark.parametrize(
    ("model", "billions", "without_embeddings"),
    [
        (QWEN3_4B, 4.02, 3.6),  # Qwen3's model cards: 4.0B, 3.6B without embeddings; 8.2B, 6.95B
        (QWEN3_8B, 8.19, 6.95),
        (LLAMA_3_8B, 8.03, 6.98),  # 8.03B
        (SMOLLM2_135M, 0.1345, 0.1062),
        (QWEN3_30B_A3B, 30.5, 29.9),  # 30.5B, 29.9B without embeddings; 3.3B active
    ],
)
def test_published_sizes(model, billions, without_embeddings):
    assert total_parameters(model) / 1e9 == pytest.approx(billions, rel=0.002)
    tables = (1 if model.tie_embeddings else 2) * model.vocab_size * model.hidden_size
    assert (total_parameters(model) - tables) / 1e9 == pytest.approx(without_embeddings, rel=0.01)


def test_active_parameters_are_the_published_ones():
    assert active_parameters(QWEN3_30B_A3B) / 1e9 == pytest.approx(3.3, rel=0.02)
    assert active_parameters(QWEN3_8B) == total_parameters(QWEN3_8B)


@pytest.mark.parametrize(("tp", "pp", "ep", "etp"), [(1, 1, 8, 1), (4, 2, 4, 1), (2, 4, 1, 4), (4, 1, 16, 2)])
def test_experts_add_up_over_their_ranks(tp, pp, ep, etp):
    parallel = ParallelConfig(
        world_size=32,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    assert parallel.expert_data_parallel_size * pp * ep * etp == 32
    stages = [rank_parameters(QWEN3_30B_A3B, parallel, stage) for stage in range(pp)]
    assert ep * etp * sum(stage.experts for stage in stages) == 48 * layer_experts(QWEN3_30B_A3B)


@pytest.mark.parametrize("model", [QWEN3_4B, QWEN3_8B])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (1, 4), (8, 2)])
def test_matrices_and_tables_add_up_over_ranks(model, tp, pp):
    parallel = ParallelConfig(world_size=tp * pp, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    stages = [rank_parameters(model, parallel, stage) for stage in range(pp)]
    assert tp * sum(stage.matrices for stage in stages) == model.num_layers * dense_matrices(model)
    copies = 1 if model.tie_embeddings and pp == 1 else 2  # 151936 rows need no padding
    assert tp * sum(stage.vocabulary for stage in stages) == copies * model.vocab_size * model.hidden_size


def test_workers_beyond_the_kv_heads_have_copies():
    assert 4 * worker_parameters(QWEN3_30B_A3B, 4).experts == 48 * layer_experts(QWEN3_30B_A3B)
    whole = worker_parameters(QWEN3_8B, 1).matrices
    assert 8 * worker_parameters(QWEN3_8B, 8).matrices == whole
    copied = 2 * 8 * QWEN3_8B.kv_channels * QWEN3_8B.hidden_size * QWEN3_8B.num_layers
    assert 16 * worker_parameters(QWEN3_8B, 16).matrices == whole + copied
