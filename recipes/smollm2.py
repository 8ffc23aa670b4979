"""SmolLM2-135M-Instruct on repair tasks, one GPU."""

from __future__ import annotations

from megatron_dagger.config import (
    BetaConfig,
    DaggerConfig,
    LimitsConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    VllmEngineConfig,
)

TOKENS = 8192  # the model's own limit

SMOLLM2_135M = ModelConfig(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=TOKENS,
    rotary_base=100_000,
    layernorm_epsilon=1e-5,
    tie_embeddings=True,
)


def smollm2_135m_repair_1gpu() -> RunConfig:
    """SmolLM2-135M-Instruct repairs packages; BF16 on one GPU, trainer and engine side by side.

    First run ``megatron-dagger convert hf-to-megatron SmolLM2-135M-Instruct checkpoints/smollm2_135m_instruct``, or
    name another checkpoint with ``init_checkpoint=PATH``.
    """
    return RunConfig(
        name="smollm2_135m_repair_1gpu",
        model=SMOLLM2_135M,
        init_checkpoint="checkpoints/smollm2_135m_instruct",
        training=TrainingConfig(
            parallel=ParallelConfig(world_size=1),
            optimizer=OptimizerConfig(lr=1e-4, decay="cosine", warmup_steps=20),
            precision="bf16",
            epochs=3,
            sequence_length=TOKENS,
            global_batch_tokens=8 * TOKENS,
        ),
        rollout=RolloutConfig(
            sampling=SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=64),
            engine=VllmEngineConfig(
                dtype="bfloat16",
                max_model_len=TOKENS,
                kv_cache_memory_mib=16 << 10,  # the trainer uses the rest of the GPU
                gpu_memory_utilization=0.3,
                enforce_eager=False,
            ),
            limits=LimitsConfig(max_turns=48, max_tokens=TOKENS),
        ),
        evaluation_sampling=SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=64),
        dagger=DaggerConfig(rounds=3, sft_tasks=64, tasks_per_round=64, beta=BetaConfig(start=0.8)),
    )
