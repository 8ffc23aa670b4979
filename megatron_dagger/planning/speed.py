"""Rates: training from its FLOPs, rollouts from a closed loop of episodes around one engine, the teacher's load."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dagger.config import RunConfig
from megatron_dagger.config.model import ModelConfig
from megatron_dagger.planning.assumptions import Assumptions
from megatron_dagger.planning.episodes import MeanEpisode
from megatron_dagger.planning.gpus import Gpu
from megatron_dagger.planning.memory import ServingMemory, dtype_bytes
from megatron_dagger.planning.parameters import dense_matrices, expert_matrices, router_weights


@dataclass(frozen=True, kw_only=True)
class TrainingSpeed:
    """The rate of training; ``tokens_per_s`` is the sum over all GPUs."""

    flops_per_token: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class RolloutSpeed:
    """The rate of one engine with ``episodes`` running, of which ``decoding`` are in the engine at a time."""

    episodes: int
    decoding: float
    turns_per_s: float
    tokens_per_s: float  # generated


@dataclass(frozen=True, kw_only=True)
class TeacherLoad:
    """The teacher's load while a round is collected, if the teacher is a served model with a prefix cache."""

    requests_per_s: float
    written_per_s: float  # tokens
    read_per_s: float  # tokens that are new to its cache
    context: float  # tokens of a prompt, on average


def flops_per_token(model: ModelConfig, sequence: float, head_share: float = 1.0, *, causal: bool = True) -> float:
    """Return the FLOPs per token of a forward and backward pass without recomputation.

    6 per weight, plus the two products of attention. Narayanan et al. (arXiv 2104.04473), appendix: a product of
    (m, k) and (k, n) takes 2 m k n, the backward pass twice the forward. ``sequence`` is the length that attention
    runs over; causal attention needs half of it. The output layer is computed for ``head_share`` of the tokens. A
    token passes ``moe_router_topk`` experts (``num_experts_routed_to`` in Megatron-LM's
    ``num_floating_point_operations``).
    """
    layers = model.num_layers * (dense_matrices(model) + router_weights(model))
    weights = layers + head_share * model.vocab_size * model.hidden_size
    attention = attention_flops_per_token(model, sequence, causal=causal)
    return 6.0 * weights + experts_flops_per_token(model) + attention


def experts_flops_per_token(model: ModelConfig) -> float:
    """Return the part of ``flops_per_token`` that the experts take; 0 for a dense model."""
    return 6.0 * model.num_layers * model.moe_router_topk * expert_matrices(model)


def attention_flops_per_token(model: ModelConfig, sequence: float, *, causal: bool = True) -> float:
    """Return the part of ``flops_per_token`` that the two products of attention take."""
    keys = sequence / 2 if causal else sequence
    return 3.0 * model.num_layers * 4.0 * keys * model.num_attention_heads * model.kv_channels


def training_speed(config: RunConfig, gpu: Gpu, assumed: Assumptions, sample: float) -> TrainingSpeed:
    """Return the tokens of packed rows per second, for samples of ``sample`` tokens on average.

    Full recomputation runs the layers' forward pass once more: a third more FLOPs (arXiv 2205.05198, section 5).
    A pipeline of p stages with v chunks idles for (p - 1) / (v m) of the time of its m micro-batches (2104.04473, 2.2).
    Ranks that share a layer's experts wait for the busiest of them.
    """
    model, training = config.model, config.training
    parallel = training.parallel
    share = 1.0 if parallel.sequence_parallel else assumed.label_share
    attention = attention_flops_per_token(model, sample)
    total = flops_per_token(model, sample, share)
    mfu = assumed.mfu_fp8 if training.precision.startswith("fp8") else assumed.mfu
    attention_rate = assumed.mfu * gpu.flops("fp32" if training.precision == "fp32" else "bf16")
    experts = experts_flops_per_token(model)
    load = assumed.expert_load if parallel.expert_model_parallel_size > 1 else 1.0
    products = total - attention - experts + experts * load / assumed.experts_share
    seconds = products / (mfu * gpu.flops(training.precision)) + attention / attention_rate
    seconds *= 4 / 3 if training.recompute == "full" else 1
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    seconds *= 1 + (parallel.pipeline_model_parallel_size - 1) / (virtual * training.micro_batches)
    return TrainingSpeed(flops_per_token=total, tokens_per_s=parallel.world_size / seconds)


def rollout_speed(
    config: RunConfig, gpu: Gpu, assumed: Assumptions, memory: ServingMemory, episode: MeanEpisode
) -> RolloutSpeed:
    """Return the turns per second of one engine in a steady state.

    The student is assumed to act in every turn, and the teacher to answer within that time. A decoding step reads the
    weights and the keys and values of all running sequences once, so memory bandwidth bounds it. n tokens that choose
    k of E experts at random use E (1 - (1 - k / E)^n) experts. While a turn is generated, each other running sequence
    brings one prompt; the prefix cache has all of it but the observation, and FLOPs bound it. Between turns an episode
    is in its sandbox. The number of episodes in the engine follows by Little's law.
    """
    engine, model = config.rollout.engine, config.model
    tp, context = engine.tensor_parallel_size, episode.tokens / 2
    cached_sequences = int(memory.kv_tokens / context) if context else 0
    concurrent = max(1, min(config.rollout.concurrent_episodes, engine.max_num_seqs, cached_sequences))
    bandwidth = gpu.bandwidth * assumed.bandwidth_share
    new_tokens = max(0.0, episode.tokens / episode.turns - episode.reply)
    forward = flops_per_token(model, context, head_share=0.0, causal=False) / 3
    rate = tp * assumed.prefill_mfu * gpu.flops("fp32" if dtype_bytes(engine) == 4 else "bf16")
    prefill_s = new_tokens * forward / rate

    def turn_s(running: float) -> float:
        """Return the seconds of a turn in the engine while ``running`` sequences are in it."""
        idle_experts = (1 - model.moe_router_topk / (model.num_moe_experts or 1)) ** running if memory.experts else 0.0
        read = memory.weights - idle_experts * memory.experts + running * context * memory.kv_bytes_per_token
        return episode.reply * (assumed.decode_step_s + read / bandwidth) + running * prefill_s

    low, high = 0.0, float(concurrent)  # turn_s grows with running: one point balances both sides
    for _ in range(60):
        running = (low + high) / 2
        in_engine = turn_s(running)
        arriving = concurrent * in_engine / (in_engine + assumed.tool_s)
        low, high = (running, high) if arriving > running else (low, running)
    per_s = concurrent / (turn_s(high) + assumed.tool_s)
    return RolloutSpeed(episodes=concurrent, decoding=high, turns_per_s=per_s, tokens_per_s=per_s * episode.reply)


def teacher_load(rollout: RolloutSpeed, episode: MeanEpisode) -> TeacherLoad:
    """Return the load of one label per turn; if the teacher acts, its action is the label."""
    new = episode.tokens / episode.turns
    return TeacherLoad(
        requests_per_s=rollout.turns_per_s,
        written_per_s=rollout.turns_per_s * episode.reply,
        read_per_s=rollout.turns_per_s * new,
        context=episode.tokens / 2,
    )
