"""A positive control of the method, in a minute on two CPU cores: a task on which DAgger must leave SFT far behind.

For the SFT arm, in which the teacher acts alone in every round, add ``dagger.beta.start=1.0``. Both arms train on the
same number of labels (``max_labels_per_round``) in the same number of steps (``max_steps``).
"""

from __future__ import annotations

from megatron_dagger.config import (
    AggregationConfig,
    BetaConfig,
    DaggerConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    RoadConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    VllmEngineConfig,
)

TOKENS = 1024


def positive_control() -> RunConfig:
    """A tiny Qwen3 follows roads and learns the way back from the teacher's labels; CPU, one process, a minute."""
    return RunConfig(
        name="positive_control",
        road=RoadConfig(stops=8, train_tasks=780, heldout_tasks=100),
        model=ModelConfig(
            num_layers=2,
            hidden_size=64,
            ffn_hidden_size=128,
            num_attention_heads=2,
            num_query_groups=2,
            kv_channels=32,
            vocab_size=384,
            max_position_embeddings=TOKENS,
            rotary_base=10_000,
            init_std=0.1,  # near 1 / sqrt(hidden_size)
        ),
        training=TrainingConfig(
            optimizer=OptimizerConfig(lr=2e-3, warmup_steps=10, weight_decay=0.1),
            epochs=1000,  # max_steps ends a round
            max_steps=160,
            sequence_length=2 * TOKENS,
            packing="shared_prefix",
            global_batch_tokens=2 * TOKENS,
        ),
        rollout=RolloutConfig(
            sampling=SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=8),
            engine=VllmEngineConfig(max_model_len=TOKENS, max_num_seqs=64, kv_cache_memory_mib=128),
            limits=LimitsConfig(max_turns=60, max_tokens=TOKENS, max_repeats=60),  # neighbouring stops may agree
            concurrent_episodes=48,
        ),
        evaluation_sampling=SamplingConfig(temperature=1.0, top_p=0.9, max_tokens=8),
        dagger=DaggerConfig(
            rounds=2,
            sft_tasks=260,
            tasks_per_round=260,
            beta=BetaConfig(schedule="constant", start=0.0),  # else the teacher's own turns show the way back, too
            aggregation=AggregationConfig(max_labels_per_round=800),
            evaluation_tasks=100,
            evaluate_rounds="last",
        ),
    )
