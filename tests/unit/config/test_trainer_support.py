"""The settings that the trainer supports with and without a GPU, and its errors for all others."""

import pytest

from megatron_dagger.config import ConfigError, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_dagger.config.families import FAMILIES
from megatron_dagger.config.trainer_support import check_supported

EXPERTS = {"family": "qwen3_moe", "num_moe_experts": 4, "moe_ffn_hidden_size": 96}
TP2 = {"world_size": 2, "tensor_model_parallel_size": 2}


def check(model, parallel, *, cuda=False, **training):
    training = TrainingConfig(parallel=ParallelConfig(**parallel), **training)
    check_supported(ModelConfig(**model), training, cuda=cuda)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_supported(family):
    check(EXPERTS | {"family": family} if FAMILIES[family].experts else {"family": family}, {})


def test_experts_are_spread_over_tensor_and_data_parallel_ranks():
    check(EXPERTS, {"world_size": 4, "expert_model_parallel_size": 4})
    check(EXPERTS, TP2 | {"sequence_parallel": True, "expert_model_parallel_size": 2})
    check(EXPERTS, TP2 | {"sequence_parallel": True, "expert_tensor_parallel_size": 2}, cuda=True)


@pytest.mark.parametrize(
    ("model", "parallel", "message"),
    [
        ({}, {"world_size": 2, "context_parallel_size": 2}, "prefix that other ranks would hold; set it to 1"),
        ({}, {"world_size": 2, "expert_model_parallel_size": 2}, "family qwen3 has no experts; set it to 1"),
        (EXPERTS | {"moe_router_topk": 1}, {}, "set model.norm_topk_prob=false"),
        (EXPERTS, TP2, "set training.parallel.sequence_parallel=true"),
        (EXPERTS | {"num_moe_experts": 6}, {"world_size": 4, "expert_model_parallel_size": 4}, r"choose one of \[1, 2"),
        (
            EXPERTS,
            {"world_size": 2, "expert_model_parallel_size": 4},
            "does not divide the 2 ranks of a pipeline stage",
        ),
        (EXPERTS, TP2 | {"sequence_parallel": True, "expert_tensor_parallel_size": 2}, "needs NCCL"),
        (
            {},
            TP2 | {"tensor_model_parallel_size": 1, "sequence_parallel": True},
            "needs tensor_model_parallel_size > 1",
        ),
    ],
)
def test_an_impossible_layout_is_refused_with_the_reason(model, parallel, message):
    with pytest.raises(ConfigError, match=message):
        check(model, parallel)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"precision": "fp8_delayed", "bf16_layers_at_ends": 1}, "use fp8_tensorwise or fp8_blockwise"),
        ({"precision": "fp8_blockwise", "bf16_layers_at_ends": 5}, "between 0 and a stage's 4 layers"),
        ({"precision": "bf16", "bf16_layers_at_ends": 1}, "bf16_layers_at_ends needs an FP8 precision"),
        ({"precision": "bf16", "fp8_param_gather": True}, "fp8_param_gather needs an FP8 precision"),
        ({"precision": "fp8_tensorwise", "sequence_length": 4104, "global_batch_tokens": 4104}, "a multiple of 16"),
        ({"precision": "fp32", "optimizer": OptimizerConfig(moments="bf16")}, "moments=bf16 needs Transformer Engine"),
        (
            {"precision": "bf16", "optimizer": OptimizerConfig(cpu_offload_fraction=0.5, distributed=False)},
            "cpu_offload_fraction=0.5 needs the distributed optimizer",
        ),
        (
            {"precision": "fp8_delayed", "recompute": "selective", "recompute_modules": ("layernorm",)},
            "cannot recompute layernorm with precision=fp8_delayed",
        ),
        (
            {"precision": "bf16", "optimizer": OptimizerConfig(cpu_offload_fraction=0.5, moments="bf16")},
            "offloads moments in fp32 only; set one of the two",
        ),
        ({"recompute": "selective", "recompute_modules": ("moe",)}, "has moe, and family qwen3 has no experts"),
    ],
)
def test_settings_that_megatron_refuses_are_refused_with_a_fix(training, message):
    with pytest.raises(ConfigError, match=message):
        check({}, {}, cuda=True, packing="separate", **training)


@pytest.mark.parametrize(
    ("model", "parallel", "precision", "message"),
    [
        ({"ffn_hidden_size": 392}, {}, "delayed", "a rank's share of the MLP to be a multiple of 16, and it is 392"),
        ({"hidden_size": 136}, {}, "tensorwise", "model.hidden_size to be a multiple of 16, and it is 136"),
        (
            {"kv_channels": 24, "num_query_groups": 4},
            TP2 | {"world_size": 4, "tensor_model_parallel_size": 4},
            "tensorwise",
            "heads to be a multiple of 16, and it is 24",
        ),
        (
            {"hidden_size": 192},
            TP2 | {"sequence_parallel": True},
            "blockwise",
            "model.hidden_size to be a multiple of 128",
        ),
        (EXPERTS | {"moe_ffn_hidden_size": 24}, {}, "blockwise", "a rank's share of the MLP to be a multiple of 16"),
    ],
)
def test_widths_that_fp8_cannot_multiply_are_refused(model, parallel, precision, message):
    with pytest.raises(ConfigError, match=message):
        check(model, parallel, cuda=True, precision=f"fp8_{precision}")
    check(model, {"world_size": 4}, cuda=True, precision="bf16")


def test_only_transformer_engine_experts_recompute_their_activation():
    with pytest.raises(ConfigError, match="which needs Transformer Engine's experts; use moe"):
        check(EXPERTS, {}, recompute="selective", recompute_modules=("moe_act",))
    check(EXPERTS, {}, cuda=True, precision="bf16", recompute="selective", recompute_modules=("moe_act",))


def test_lower_precision_needs_a_gpu():
    for settings in ({"precision": "fp8_blockwise"}, {"optimizer": OptimizerConfig(moments="bf16")}):
        with pytest.raises(ConfigError, match="GPU"):
            check({}, {}, **settings)
