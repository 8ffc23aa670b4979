"""Short repairs in minutes on two CPU cores: a small Qwen3 searches for one mistake in a package and repairs it."""

from __future__ import annotations

from megatron_dagger.config import (
    BetaConfig,
    DaggerConfig,
    LimitsConfig,
    OptimizerConfig,
    ParallelConfig,
    RepoRepairConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    VllmEngineConfig,
)
from megatron_dagger.recipes.small_qwen3 import small_qwen3

TOKENS = 2048


def short_repair() -> RunConfig:
    """A 0.5M-parameter Qwen3 repairs pure-Python packages; CPU, TP2 x PP2, minutes."""
    return RunConfig(
        name="short_repair",
        repo_repair=RepoRepairConfig(
            train_packages=("boltons", "deepmerge", "humanize", "munch", "parse", "toolz", "webcolors"),
            heldout_packages=("inflection", "jsonpointer", "pytimeparse", "roman", "schema", "unidiff"),
            train_tasks=96,
            heldout_tasks=40,
        ),
        model=small_qwen3(TOKENS),
        training=TrainingConfig(
            parallel=ParallelConfig(world_size=4, tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=10, weight_decay=0.1),
            epochs=8,
            max_steps=140,
            sequence_length=TOKENS,
            packing="shared_prefix",
            global_batch_tokens=2 * TOKENS,
        ),
        rollout=RolloutConfig(
            sampling=SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=24),
            engine=VllmEngineConfig(max_model_len=TOKENS, max_num_seqs=64, kv_cache_memory_mib=128),
            limits=LimitsConfig(max_turns=48, max_tokens=TOKENS),
            concurrent_episodes=12,
        ),
        evaluation_sampling=SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=24),
        dagger=DaggerConfig(
            rounds=2,
            sft_tasks=52,
            tasks_per_round=44,
            beta=BetaConfig(schedule="linear", start=0.3, decay=0.2),
            evaluation_tasks=40,
        ),
    )
