"""Long repairs on two CPU cores: a small Qwen3 repairs several mistakes of a package through a shell.

For the SFT arm, in which the teacher acts alone in every round, add ``dagger.beta.start=1.0``.
"""

from __future__ import annotations

from megatron_dagger.config import (
    AggregationConfig,
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

BUGS = 4
TERSE = 0.09  # about one mistake in a hundred turns of a student that knows all but the rules
# Packages with eight bugs that tests tell apart; the held-out ones are never trained on.
TRAIN_PACKAGES = ("boltons", "cachetools", "humanize", "netaddr", "num2words", "parse", "pyrsistent", "sqlparse",
                  "toolz", "voluptuous")  # fmt: skip
HELDOUT_PACKAGES = ("jsonpointer", "schema", "simpleeval", "tabulate", "unidiff")


def long_repair(bugs: int = BUGS) -> RunConfig:
    """A 0.5M-parameter Qwen3 repairs four bugs in a row in pure-Python packages; one CPU process, 11 minutes."""
    tokens = 512 + 320 * bugs  # the teacher's episodes take 200 for a bug, with system and task messages
    row_tokens = max(3072, tokens)  # several episodes of few bugs, such that a step is as long at every horizon
    sampling = SamplingConfig(temperature=0.7, top_p=1.0, max_tokens=40)
    return RunConfig(
        name="long_repair",
        repo_repair=RepoRepairConfig(
            bugs=bugs,
            terse=TERSE,
            train_packages=TRAIN_PACKAGES,
            heldout_packages=HELDOUT_PACKAGES,
            train_tasks=440,
            heldout_tasks=40,
        ),
        model=small_qwen3(tokens),
        training=TrainingConfig(
            parallel=ParallelConfig(world_size=1),
            optimizer=OptimizerConfig(lr=3e-3, warmup_steps=10, weight_decay=0.1),
            epochs=1000,  # max_steps ends a round
            max_steps=200,
            max_sft_steps=1000,  # round 1 wants a student that can work
            sequence_length=row_tokens,
            packing="shared_prefix",
            global_batch_tokens=row_tokens,
        ),
        rollout=RolloutConfig(
            sampling=sampling,
            engine=VllmEngineConfig(max_model_len=tokens, max_num_seqs=64, kv_cache_memory_mib=256),
            limits=LimitsConfig(max_turns=16 + 14 * bugs, max_tokens=tokens),
            concurrent_episodes=16,
        ),
        evaluation_sampling=sampling,
        dagger=DaggerConfig(
            rounds=2,
            sft_tasks=290,
            tasks_per_round=75,
            beta=BetaConfig(schedule="constant", start=0.0),
            takeover_turns=6,  # the way back takes as many
            aggregation=AggregationConfig(
                deduplicate=False,  # all tasks begin in the same state, whose label must not count once in all
                max_labels_per_round=1600,
                max_sft_labels=6400,
            ),
            evaluation_tasks=40,
        ),
    )
