"""FLOPs against published formulas, rates and hours in limiting cases."""

from dataclasses import replace

import pytest

from megatron_dagger.config import ModelConfig, override
from megatron_dagger.planning import GPUS, Assumptions, plan_run
from megatron_dagger.planning.episodes import MeanEpisode, mean_sample, row_tokens, student_share
from megatron_dagger.planning.memory import serving_memory
from megatron_dagger.planning.speed import flops_per_token, rollout_speed, training_speed
from megatron_dagger.recipes import find_recipe
from megatron_dagger.recipes.qwen3 import QWEN3_30B_A3B

H100, ASSUMED = GPUS["h100"], Assumptions()


def config(*settings):
    return override(find_recipe("qwen3_4b_swegym_8h100")(), list(settings))


def rollout(c, assumed=ASSUMED):
    memory = serving_memory(c.model, c.rollout.engine, H100, assumed)
    return rollout_speed(c, H100, assumed, memory, MeanEpisode.of(c, assumed))


def test_flops_match_the_formula_of_narayanan_et_al():
    """96 B s l h^2 (1 + s/6h + V/16lh) with recomputation, for an MLP of 8 h^2 weights and attention over all keys."""
    hidden, layers, sequence, vocabulary = 3072, 20, 2048, 51_200
    model = ModelConfig(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=8 * hidden // 3,
        num_attention_heads=24,
        num_query_groups=24,
        kv_channels=128,
        vocab_size=vocabulary,
    )
    published = 96 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocabulary / (16 * layers * hidden))
    head = 6 * vocabulary * hidden  # not recomputed in the formula either
    ours = (flops_per_token(model, sequence, causal=False) - head) * 4 / 3 + head
    assert ours == pytest.approx(published, rel=1e-6)


def test_a_token_costs_only_the_experts_that_it_is_sent_to():
    """Megatron-LM's ``num_floating_point_operations``: it counts topk experts; ours adds the router."""
    model = QWEN3_30B_A3B
    dense = replace(
        model,
        family="qwen3",
        num_moe_experts=None,
        moe_ffn_hidden_size=None,
        ffn_hidden_size=model.moe_router_topk * model.moe_ffn_hidden_size,
    )
    router = 6 * model.num_layers * model.num_moe_experts * model.hidden_size
    assert flops_per_token(model, 4096) - router == pytest.approx(flops_per_token(dense, 4096))


def test_ranks_wait_for_the_busiest_experts():
    base = override(find_recipe("qwen3_30b_a3b_swegym_4x8h100")(), ["training.recompute=none"])
    busy, even = (training_speed(base, H100, Assumptions(expert_load=load), 16_384.0) for load in (2.0, 1.0))
    assert busy.flops_per_token == even.flops_per_token
    assert 1 < even.tokens_per_s / busy.tokens_per_s < 2
    alone = override(base, ["training.parallel.expert_model_parallel_size=1"])
    assert training_speed(alone, H100, Assumptions(expert_load=2.0), 16_384.0) == even


def test_few_sequences_read_few_experts():
    single, many = (
        rollout(override(find_recipe("qwen3_30b_a3b_swegym_4x8h100")(), [f"rollout.concurrent_episodes={n}"]))
        for n in (1, 64)
    )
    dense = rollout(config("rollout.concurrent_episodes=1"))
    assert single.turns_per_s > 0.9 * dense.turns_per_s  # 3.3B active of 30.5B read about as a 4B model
    assert many.turns_per_s < 64 * single.turns_per_s


def test_full_recomputation_costs_a_third_and_a_pipeline_its_bubble():
    base, sample = config(), 16_384.0
    speed = training_speed(base, H100, ASSUMED, sample).tokens_per_s
    full = training_speed(config("training.recompute=full"), H100, ASSUMED, sample).tokens_per_s
    assert speed / full == pytest.approx(4 / 3)
    names = ("tensor_model_parallel_size=4", "pipeline_model_parallel_size=2")
    piped = config(*(f"training.parallel.{name}" for name in names))
    assert speed / training_speed(piped, H100, ASSUMED, sample).tokens_per_s == pytest.approx(1 + 1 / 8)


def test_a_single_episode_waits_for_each_of_its_steps():
    single = config("rollout.concurrent_episodes=1")
    speed, assumed = rollout(single), ASSUMED
    episode = MeanEpisode.of(single, assumed)
    memory = serving_memory(single.model, single.rollout.engine, H100, assumed)
    read = (memory.weights + memory.kv_bytes_per_token * episode.tokens / 2) / (3.35e12 * 0.7)
    decoding = episode.reply * (assumed.decode_step_s + read)
    assert 1 / speed.turns_per_s == pytest.approx(decoding + assumed.tool_s, rel=0.02)  # and a short prompt


def test_more_episodes_mean_more_turns_until_the_kv_cache_is_full():
    rates = [rollout(config(f"rollout.concurrent_episodes={n}")) for n in (1, 8, 64, 4096)]
    assert [r.turns_per_s for r in rates] == sorted(r.turns_per_s for r in rates)
    assert rates[-1].episodes == 64 == config().rollout.engine.max_num_seqs
    tight = rollout(config("rollout.engine.kv_cache_memory_mib=2400"))
    assert 1 <= tight.episodes < 8


def test_episodes_in_the_engine_and_in_the_sandbox_add_up():
    speed = rollout(config())
    assert speed.decoding + speed.turns_per_s * ASSUMED.tool_s == pytest.approx(speed.episodes, rel=1e-6)


def test_the_students_share_of_the_turns():
    dagger = config().dagger
    assert student_share(dagger, 0.7, 3, 50) == pytest.approx(0.3)
    assert student_share(dagger, 0.0, 0, 50) == 0
    prefix = replace(dagger, mixing="prefix", prefix_turns_per_round=20)
    assert student_share(prefix, 0.0, 1, 50) == pytest.approx(10 / 50)  # k ~ Uniform{0..20}
    assert student_share(prefix, 0.0, 5, 50) == pytest.approx((sum(range(50)) + 51 * 50) / 101 / 50)


def test_separate_samples_repeat_their_prefixes():
    episode, assumed = MeanEpisode(turns=50, tokens=30_000, reply=200), Assumptions(agreement=0.5)
    separate = config().training
    shared = replace(separate, precision="fp32", packing="shared_prefix")
    assert row_tokens(separate, assumed, episode, 0.0) == row_tokens(shared, assumed, episode, 0.0) == 30_000
    assert row_tokens(shared, assumed, episode, 0.4) == 30_000 + 10 * 200
    assert row_tokens(separate, assumed, episode, 0.4) == 30_000 + 10 * (15_000 + 200)
    assert mean_sample(separate, assumed, episode, 0.0) == 30_000
    assert 15_000 < mean_sample(separate, assumed, episode, 1.0) < 30_000


def test_later_rounds_train_on_more_data_up_to_max_steps():
    def steps(*settings):
        c = config("dagger.rounds=3", *settings)
        return [r.optimizer_steps for r in plan_run(c, [1.0, 0.8, 0.6, 0.6], H100, ASSUMED).rounds]

    assert steps() == sorted(set(steps()))
    assert steps("training.max_steps=5") == [5, 5, 5, 5]
    assert steps("training.max_steps=5", "training.max_sft_steps=7") == [7, 5, 5, 5]
    current = steps("dagger.aggregation.window=current")
    assert current[3] == current[2]
    assert steps("dagger.aggregation.window=last", "dagger.aggregation.last_rounds=1") == current


def test_hours_follow_from_the_rates():
    plan = plan_run(config("dagger.rounds=1"), [1.0, 0.8], H100, ASSUMED)
    last = plan.rounds[1]
    assert last.turns == 512 * 50
    assert last.rollout_s == pytest.approx(ASSUMED.other_s + last.turns / plan.rollout.turns_per_s)
    assert last.train_s == pytest.approx(ASSUMED.other_s + last.train_tokens / last.train_tokens_per_s)
    assert plan.teacher.requests_per_s == plan.rollout.turns_per_s
