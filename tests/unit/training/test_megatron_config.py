"""Our settings as Megatron-Core's TransformerConfig, whichever release is installed."""

import dataclasses
from types import SimpleNamespace

import pytest

from megatron_dagger.config import ModelConfig, ParallelConfig, TrainingConfig, YarnConfig
from megatron_dagger.training import compat, megatron_config, optimizer

MOE = {"family": "qwen3_moe", "num_moe_experts": 4, "moe_ffn_hidden_size": 96, "norm_topk_prob": False}


def built(shape=None, **training):
    """Return Megatron's config as on a GPU, except the fused RoPE, which it refuses without Transformer Engine."""
    settings = megatron_config.settings(ModelConfig(**(shape or {})), TrainingConfig(**training), cuda=True)
    known = {field.name for field in dataclasses.fields(compat.TransformerConfig)}
    assert settings.keys() <= known, "a setting would be dropped silently"
    return compat.transformer_config(**settings | {"apply_rope_fusion": False})


def assert_has(config, **expected):
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("delayed", {"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
        ("tensorwise", {"fp8": "hybrid"}),
        ("blockwise", {"fp8": "e4m3"}),
    ],
)
def test_fp8_recipes(recipe, expected):
    config = built(precision=f"fp8_{recipe}")
    assert_has(config, fp8_recipe=recipe, bf16=True, fp8_param=False, first_last_layers_bf16=False, **expected)
    assert optimizer.settings(TrainingConfig(precision=f"fp8_{recipe}"))["fp8_recipe"] == recipe


def test_layers_at_the_ends_in_bf16_and_weights_in_fp8():
    training = {"precision": "fp8_tensorwise", "bf16_layers_at_ends": 2, "fp8_param_gather": True}
    assert_has(
        built(**training),
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=2,
        num_layers_at_end_in_bf16=2,
        fp8_param=True,
    )
    assert optimizer.data_parallel_config(TrainingConfig(**training)).fp8_param_gather
    assert not optimizer.data_parallel_config(TrainingConfig()).fp8_param_gather


def test_recomputation():
    assert_has(
        built(recompute="full"), recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    assert_has(built(recompute="selective"), recompute_granularity="selective", recompute_modules=["core_attn"])
    chosen = built(MOE, precision="bf16", recompute="selective", recompute_modules=("layernorm", "moe_act"))
    assert_has(chosen, recompute_granularity="selective", recompute_modules=["layernorm", "moe_act"])


def test_experts():
    parallel = ParallelConfig(world_size=4, expert_model_parallel_size=4)
    expected = {"num_moe_experts": 4, "moe_ffn_hidden_size": 96, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.0}
    config = built(MOE, parallel=parallel, precision="bf16")
    assert_has(
        config, **expected, expert_model_parallel_size=4, expert_tensor_parallel_size=1, moe_router_pre_softmax=True
    )
    assert_has(config, moe_grouped_gemm=True, moe_router_dtype="fp32", moe_router_load_balancing_type="none")
    fp8 = megatron_config.settings(ModelConfig(**MOE), TrainingConfig(precision="fp8_blockwise"), cuda=True)
    assert fp8["moe_router_padding_for_quantization"]  # an expert's tokens are a multiple of nothing


def test_yarn_is_not_fused():
    stretched, plain = ModelConfig(yarn=YarnConfig(factor=2.0)), ModelConfig()
    config = megatron_config.transformer_config(stretched, TrainingConfig())
    assert_has(config, yarn_rotary_scaling_factor=2.0, yarn_original_max_position_embeddings=32768, yarn_mscale=None)
    bf16 = TrainingConfig(precision="bf16")
    assert [megatron_config.settings(m, bf16, cuda=True)["apply_rope_fusion"] for m in (stretched, plain)] == [
        False,
        True,
    ]
    assert not hasattr(megatron_config.transformer_config(plain, TrainingConfig()), "yarn_rotary_scaling_factor")


def test_without_fp8_restores_the_precision_even_after_an_error():
    config = SimpleNamespace(fp8="e4m3")

    def fail():
        assert config.fp8 is None
        raise KeyError

    with pytest.raises(KeyError), megatron_config.without_fp8([config]):
        fail()
    assert config.fp8 == "e4m3"
