"""Memory: published formulas, serving, and the recipes' needs."""

from dataclasses import replace

import pytest

from megatron_dagger.config import OptimizerConfig, ParallelConfig, TrainingConfig, VllmEngineConfig, override
from megatron_dagger.planning import GPUS, Assumptions
from megatron_dagger.planning.activations import in_flight_layers, layer_bytes, logits_bytes
from megatron_dagger.planning.memory import GIB, kv_bytes_per_token, serving_memory, state_bytes, training_memory
from megatron_dagger.planning.run_plan import memory_of
from megatron_dagger.recipes import RECIPES, find_recipe
from megatron_dagger.recipes.qwen3 import QWEN3_4B, QWEN3_8B, QWEN3_30B_A3B

BF16 = TrainingConfig(precision="bf16", sequence_length=4096, global_batch_tokens=64 * 4096)


def layout(world_size=8, tp=1, pp=1, **parallel):
    return ParallelConfig(
        world_size=world_size, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **parallel
    )


def test_state_takes_18_bytes_per_parameter_or_6_plus_12_over_dp_as_in_megatron():
    assert sum(state_bytes(replace(BF16, parallel=layout()), 1000)) == 1000 * (6 + 12 / 8)
    replicated = OptimizerConfig(distributed=False)
    assert sum(state_bytes(replace(BF16, parallel=layout(), optimizer=replicated), 1000)) == 18_000


def test_moments_in_lower_precision_and_offloading_count():
    def state(**optimizer):
        return state_bytes(replace(BF16, parallel=layout(), optimizer=OptimizerConfig(**optimizer)), 1000)[2]

    assert state(moments="bf16") == 1000 * (4 + 2 * 2) / 8
    assert state(moments="fp8") == 1000 * (4 + 2 * 1) / 8
    assert state(cpu_offload_fraction=0.75) == 1000 * (4 + 2 * 4) / 8 / 4


def test_a_layer_keeps_about_as_much_as_megatron_lm_estimates():
    """``theoretical_memory_usage.py``: s b h (18 + 4 ffn/h) with sequence parallelism and selective recomputation.

    Its formula has two bytes of dropout masks, which we do not use, and GELU's two FFN widths instead of SwiGLU's
    three. It has neither per-head norms nor QKV next to the rotated Q and K.
    """
    model = replace(QWEN3_8B, num_query_groups=32, family="llama", kv_channels=128)
    training = replace(BF16, parallel=layout(tp=8, sequence_parallel=True), recompute="selective")
    ours = layer_bytes(model, training, te=True) * 8 / training.sequence_length
    megatron = model.hidden_size * 18 + 4 * model.ffn_hidden_size
    more = 2 * model.ffn_hidden_size + 4 * model.hidden_size  # SwiGLU; Q and K with RoPE
    assert ours == pytest.approx(megatron - 2 * model.hidden_size + more)


def test_a_pipelines_first_stage_holds_most():
    parallel = layout(pp=4)
    training = replace(BF16, parallel=parallel)
    assert [in_flight_layers(QWEN3_8B, training, stage) for stage in range(4)] == [36, 27, 18, 9]
    interleaved = replace(training, parallel=replace(parallel, virtual_pipeline_model_parallel_size=3))
    layers = in_flight_layers(QWEN3_8B, interleaved, 0)
    assert layers == 36 * (1 + 3 / (4 * 3))  # 1 + (p - 1) / (p v) of all layers: arXiv 2205.05198, section 4.2.3


def test_recomputation_trades_memory_only_downwards():
    sizes = {
        mode: training_memory(QWEN3_8B, replace(BF16, recompute=mode), GPUS["h100"], Assumptions(), 0).total
        for mode in ("none", "selective", "full")
    }
    assert sizes["none"] >= sizes["selective"] > sizes["full"]


def test_fp8_keeps_two_more_bytes_per_weight_and_smaller_inputs():
    bf16, fp8 = (
        training_memory(QWEN3_8B, replace(BF16, precision=name), GPUS["h100"], Assumptions(), 0)
        for name in ("bf16", "fp8_tensorwise")
    )
    assert bf16.fp8_weights == 0
    assert fp8.fp8_weights == pytest.approx(2 * 6.95e9, rel=0.01)
    assert fp8.activations < bf16.activations
    gathered = replace(BF16, precision="fp8_tensorwise", fp8_param_gather=True)
    kept = training_memory(QWEN3_8B, gathered, GPUS["h100"], Assumptions(), 0)
    assert fp8.weights - kept.weights == kept.fp8_weights == fp8.fp8_weights


def test_the_state_of_experts_is_cut_over_the_ranks_that_hold_the_same_experts():
    training = replace(BF16, parallel=layout(world_size=32, tp=4, sequence_parallel=True, expert_model_parallel_size=8))
    shared, experts = state_bytes(training, 1000), state_bytes(training, 1000, experts=1000)
    assert (sum(shared), sum(experts)) == (1000 * (6 + 12 / 8), 1000 * (6 + 12 / 4))


def test_expert_parallelism_reduces_weights_but_not_tokens_if_the_load_is_balanced():
    def memory(ep, expert_load=1.0):
        parallel = layout(tp=4, sequence_parallel=True, expert_model_parallel_size=ep)
        training = replace(BF16, parallel=parallel)
        return training_memory(QWEN3_30B_A3B, training, GPUS["h100"], Assumptions(expert_load=expert_load), 0)

    assert memory(8).weights < memory(1).weights / 5
    assert memory(8).optimizer == pytest.approx(memory(1).optimizer)  # cut over as many ranks, one way or the other
    assert memory(8).activations == memory(1).activations == memory(1, expert_load=2.0).activations
    assert memory(8, expert_load=2.0).activations > 1.4 * memory(8).activations


def test_recomputing_the_experts_leaves_about_a_dense_layers_attention():
    parallel = layout(tp=4, sequence_parallel=True, expert_model_parallel_size=8)
    kept = {
        modules: layer_bytes(
            QWEN3_30B_A3B,
            replace(BF16, parallel=parallel, recompute="selective", recompute_modules=modules),
            te=True,
        )
        * 4
        / BF16.sequence_length
        for modules in ((), ("moe_act",), ("moe",), ("moe", "layernorm"))
    }
    topk, hidden, ffn = 8, 2048, 768
    sizes = list(kept.values())
    assert sizes == sorted(sizes, reverse=True)
    assert kept[()] - kept["moe_act",] == 2 * topk * ffn
    dispatched, router = topk * (2 * hidden + 3 * 2 * ffn + 4), topk * (8 + 4 + 8) + 128 * (1 + 4)
    assert kept[()] - kept["moe",] == dispatched + router
    assert kept["moe",] - kept["moe", "layernorm"] == 2 * hidden


def test_the_canary_needs_logits_of_a_whole_row():
    long = replace(BF16, sequence_length=65_536, global_batch_tokens=64 * 65_536, recompute="full")
    memory = training_memory(QWEN3_4B, long, GPUS["h100"], Assumptions(label_share=0.01, fragmentation=0), 0)
    assert memory.activations + memory.working >= logits_bytes(QWEN3_4B, long, 65_536, kept=False)
    assert logits_bytes(QWEN3_4B, long, 65_536, kept=False) == 65_536 * 151_936 * 6


def test_kv_cache_of_known_models():
    engine = VllmEngineConfig(dtype="bfloat16", max_model_len=65_536, kv_cache_memory_mib=None)
    assert kv_bytes_per_token(QWEN3_8B, engine) == 36 * 8 * 128 * 2 * 2 == 144 * 1024
    assert kv_bytes_per_token(QWEN3_8B, replace(engine, tensor_parallel_size=16)) == 144 * 1024 / 8
    memory = serving_memory(QWEN3_8B, engine, GPUS["h100"], Assumptions())
    assert memory.weights == pytest.approx(2 * 8.19e9, rel=0.01)
    assert memory.full_sequences == (memory.kv_cache // memory.kv_bytes_per_token) // 65_536 == 5
    fixed = serving_memory(QWEN3_8B, replace(engine, kv_cache_memory_mib=9 * 1024), GPUS["h100"], Assumptions())
    assert (fixed.kv_cache, fixed.full_sequences) == (9 * GIB, 1)


def test_an_engine_holds_all_experts():
    engine = VllmEngineConfig(dtype="bfloat16", tensor_parallel_size=4, kv_cache_memory_mib=None)
    memory = serving_memory(QWEN3_30B_A3B, engine, GPUS["h100"], Assumptions())
    assert memory.weights == pytest.approx(2 * 30.5e9 / 4, rel=0.01)
    assert memory.experts == 2 * 48 * 128 * 3 * 2048 * 768 / 4


def test_an_engine_in_fp8_needs_half_the_bytes_for_its_matrices():
    engine = VllmEngineConfig(dtype="bfloat16", tensor_parallel_size=4, kv_cache_memory_mib=None)
    plain, fp8 = (
        serving_memory(QWEN3_8B, replace(engine, quantization=name), GPUS["h100"], Assumptions())
        for name in ("none", "fp8")
    )
    matrices = 6.95e9 / 4
    assert plain.weights - fp8.weights == pytest.approx(matrices, rel=0.01)
    assert fp8.kv_cache - plain.kv_cache == pytest.approx(plain.weights - fp8.weights)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_gpus(name):
    assert memory_of(find_recipe(name)(), GPUS["h100"], Assumptions()).problems() == []


def test_trainer_and_engine_fit_one_gpu_only_in_the_recipe_for_it():
    assert memory_of(find_recipe("smollm2_135m_repair_1gpu")(), GPUS["h100"], Assumptions()).fit_together
    assert not memory_of(find_recipe("qwen3_4b_swegym_8h100")(), GPUS["h100"], Assumptions()).fit_together


def test_problems_name_the_memory_that_is_exceeded():
    config = override(find_recipe("qwen3_8b_swegym_8h100")(), ["training.parallel.tensor_model_parallel_size=4"])
    [problem] = memory_of(config, GPUS["h100"], Assumptions()).problems()
    assert "GiB on a GPU of pipeline stage 0, which has 79.1" in problem
    small = override(find_recipe("qwen3_8b_swegym_8h100")(), ["rollout.engine.kv_cache_memory_mib=100"])
    [problem] = memory_of(small, GPUS["h100"], Assumptions()).problems()
    assert "less than rollout.engine.max_model_len=65536" in problem
