"""Qwen3-4B, 8B and 30B-A3B with the published settings of "Revisiting DAgger in the Era of LLM-Agents" (2605.12913).

SWE-Gym with 100 tasks held out, 64k tokens and 100 turns, 5 rounds of 512 tasks, 3 passes over the data, lr 3e-6
constant without warm-up, batches of about 16 episodes; the student samples at temperature 0.7 and top-p 0.9 and is
evaluated greedily; containers have 4 processors and 16 GB. A round trains on the labels of all rounds so far, as the
paper says; its released code trains on the round's own (``dagger.aggregation.window=current``).

The teacher, Qwen3-Coder-30B-A3B-Instruct, is an endpoint at ``teacher.urls``. On 8 GPUs it is served on four of them
while a round is collected, with the student on the other four (``slurm/single_node_with_teacher.sbatch``); for four
nodes it is served elsewhere (``slurm/multi_node.sbatch``).

``qwen3_coder_30b_a3b_swebench_4x8h100`` is no published run: today's student and a hosted teacher.

The layouts fit H100s according to ``megatron-dagger plan``; none of them has run on one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

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
    SweConfig,
    TeacherConfig,
    TrainingConfig,
    VllmEngineConfig,
)
from megatron_dagger.envs.swe.swegym import HELD_OUT

TOKENS = 65_536
REPLY_TOKENS = 4_096  # of a turn
BATCH_TOKENS = 8 * TOKENS  # of a step: 16 episodes of half the limit
GPUS_PER_NODE = 8

QWEN3_4B = ModelConfig(  # Qwen3-4B-Instruct-2507
    num_layers=36,
    hidden_size=2560,
    ffn_hidden_size=9728,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151_936,
    max_position_embeddings=262_144,
    rotary_base=5_000_000,
    tie_embeddings=True,
)
QWEN3_8B = ModelConfig(  # Qwen3-8B with its rotary base raised from 1e6 and its limit from 40,960, as published
    num_layers=36,
    hidden_size=4096,
    ffn_hidden_size=12_288,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=151_936,
    max_position_embeddings=TOKENS,
    rotary_base=5_000_000,
    tie_embeddings=False,
)
QWEN3_30B_A3B = ModelConfig(  # Qwen3-30B-A3B-Instruct-2507
    family="qwen3_moe",
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=6144,
    num_attention_heads=32,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=151_936,
    max_position_embeddings=262_144,
    rotary_base=10_000_000,
    tie_embeddings=False,
    num_moe_experts=128,
    moe_ffn_hidden_size=768,
    moe_router_topk=8,
)
QWEN3_CODER_30B_A3B = replace(QWEN3_30B_A3B, ffn_hidden_size=5472)  # no layer uses it


def qwen3_4b_swegym_8h100() -> RunConfig:
    """Qwen3-4B-Instruct-2507 on SWE-Gym; 64k tokens, one node of 8 H100s.

    First run ``megatron-dagger convert hf-to-megatron Qwen3-4B-Instruct-2507 checkpoints/qwen3_4b_instruct_2507
    --tensor-parallel 8 --dtype bfloat16``, or name another checkpoint with ``init_checkpoint=PATH``.
    """
    return _recipe("qwen3_4b_swegym_8h100", QWEN3_4B, "checkpoints/qwen3_4b_instruct_2507", _parallel(nodes=1))


def qwen3_8b_swegym_8h100() -> RunConfig:
    """Qwen3-8B on SWE-Gym; 64k tokens, one node of 8 H100s.

    Set ``rope_theta`` to 5000000 and ``max_position_embeddings`` to 65536 in its config.json, then run
    ``megatron-dagger convert hf-to-megatron Qwen3-8B checkpoints/qwen3_8b --tensor-parallel 8 --dtype bfloat16``,
    or name another checkpoint with ``init_checkpoint=PATH``.
    """
    return _recipe("qwen3_8b_swegym_8h100", QWEN3_8B, "checkpoints/qwen3_8b", _parallel(nodes=1))


def qwen3_4b_fp8_swegym_8h100() -> RunConfig:
    """Qwen3-4B-Instruct-2507 on SWE-Gym as ``qwen3_4b_swegym_8h100``, trained in FP8; one node of 8 H100s."""
    return _in_fp8(qwen3_4b_swegym_8h100())


def qwen3_8b_fp8_swegym_8h100() -> RunConfig:
    """Qwen3-8B on SWE-Gym as ``qwen3_8b_swegym_8h100``, trained in FP8; one node of 8 H100s."""
    return _in_fp8(qwen3_8b_swegym_8h100())


def qwen3_4b_swegym_4x8h100() -> RunConfig:
    """Qwen3-4B-Instruct-2507 on SWE-Gym; 64k tokens, four nodes of 8 H100s.

    Make the checkpoint as for ``qwen3_4b_swegym_8h100``. Each node that collects has its own engine.
    """
    return _recipe("qwen3_4b_swegym_4x8h100", QWEN3_4B, "checkpoints/qwen3_4b_instruct_2507", _parallel(nodes=4))


def qwen3_8b_swegym_4x8h100() -> RunConfig:
    """Qwen3-8B on SWE-Gym; 64k tokens, four nodes of 8 H100s.

    Make the checkpoint as for ``qwen3_8b_swegym_8h100``. Each node that collects has its own engine.
    """
    return _recipe("qwen3_8b_swegym_4x8h100", QWEN3_8B, "checkpoints/qwen3_8b", _parallel(nodes=4))


def qwen3_30b_a3b_swegym_4x8h100() -> RunConfig:
    """Qwen3-30B-A3B-Instruct-2507 on SWE-Gym; 64k tokens, experts over 8 GPUs, four nodes of 8 H100s.

    First run ``megatron-dagger convert hf-to-megatron Qwen3-30B-A3B-Instruct-2507
    checkpoints/qwen3_30b_a3b_instruct_2507 --tensor-parallel 4 --dtype bfloat16``, or name another checkpoint with
    ``init_checkpoint=PATH``. An engine does not span nodes.
    """
    parallel = _parallel(nodes=4, tensor=4, experts=8)  # there are four KV heads
    return _recipe(
        "qwen3_30b_a3b_swegym_4x8h100",
        QWEN3_30B_A3B,
        "checkpoints/qwen3_30b_a3b_instruct_2507",
        parallel,
        recompute="full",
    )


def qwen3_coder_30b_a3b_swebench_4x8h100() -> RunConfig:
    """Qwen3-Coder-30B-A3B-Instruct taught by a hosted model, SWE-bench Verified; four nodes of 8 H100s.

    Trained on SWE-Gym, evaluated on all of SWE-bench Verified after the last round. Name the teacher with
    ``'teacher.urls=[https://HOST/v1]' teacher.model=NAME``, and put its key into the variable OPENAI_API_KEY. It labels
    25,600 turns a round and reads 16,000 tokens for each, most of them from its cache: set the two prices of
    ``teacher`` and ``teacher.money_budget``. First run
    ``megatron-dagger convert hf-to-megatron Qwen3-Coder-30B-A3B-Instruct checkpoints/qwen3_coder_30b_a3b_instruct
    --tensor-parallel 4 --dtype bfloat16``, or name another checkpoint with ``init_checkpoint=PATH``.
    """
    recipe = qwen3_30b_a3b_swegym_4x8h100()
    return replace(
        recipe,
        name="qwen3_coder_30b_a3b_swebench_4x8h100",
        swe=replace(recipe.swe, heldout="SWE-bench/SWE-bench_Verified", heldout_of_train=0),
        model=QWEN3_CODER_30B_A3B,
        init_checkpoint="checkpoints/qwen3_coder_30b_a3b_instruct",
        teacher=replace(recipe.teacher, urls=("https://teacher.example/v1",), model="hosted-model"),
        dagger=replace(recipe.dagger, rounds=3, evaluation_tasks=500, evaluate_rounds="last"),
    )


def _in_fp8(recipe: RunConfig) -> RunConfig:
    """Return the recipe with an FP8 scale per tensor: blocks of 128 do not divide the 4B's 9728 / TP8."""
    name = recipe.name.replace("_swegym", "_fp8_swegym")
    return replace(recipe, name=name, training=replace(recipe.training, precision="fp8_tensorwise"))


def _parallel(*, nodes: int, tensor: int = 8, experts: int = 1) -> ParallelConfig:
    return ParallelConfig(
        world_size=nodes * GPUS_PER_NODE,
        nodes=nodes,
        tensor_model_parallel_size=tensor,  # with 4, a row of 64k tokens of a dense model does not fit
        sequence_parallel=True,
        expert_model_parallel_size=experts,
    )


def _recipe(
    name: str,
    model: ModelConfig,
    init_checkpoint: str,
    parallel: ParallelConfig,
    *,
    recompute: Literal["none", "full"] = "none",
) -> RunConfig:
    return RunConfig(
        name=name,
        swe=SweConfig(train="SWE-Gym/SWE-Gym", train_dataset="swe-gym", train_split="train", heldout_of_train=HELD_OUT),
        model=model,
        init_checkpoint=init_checkpoint,
        training=TrainingConfig(
            parallel=parallel,
            optimizer=OptimizerConfig(lr=3e-6, decay="constant", warmup_steps=0),
            precision="bf16",
            epochs=3,
            sequence_length=TOKENS,
            packing="separate",
            global_batch_tokens=BATCH_TOKENS,
            recompute=recompute,
            checkpoint_interval=50,
            deadline_s=24 * 3600.0,
        ),
        rollout=RolloutConfig(
            sampling=SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=REPLY_TOKENS),
            engine=VllmEngineConfig(
                dtype="bfloat16",
                tensor_parallel_size=4,
                max_model_len=TOKENS,
                kv_cache_memory_mib=None,
                enforce_eager=False,
            ),
            limits=LimitsConfig(max_turns=100, max_tokens=TOKENS, max_seconds=3600.0),
            concurrent_episodes=64,
        ),
        teacher=TeacherConfig(
            urls=("http://localhost:8000/v1",),
            model="Qwen/Qwen3-Coder-30B-A3B-Instruct",
            sampling=SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=REPLY_TOKENS),
        ),
        evaluation_sampling=SamplingConfig(temperature=0.0, top_p=1.0, max_tokens=REPLY_TOKENS),
        dagger=DaggerConfig(
            rounds=5,
            sft_tasks=512,
            tasks_per_round=512,
            beta=BetaConfig(schedule="linear", start=1.0, decay=0.2, floor=0.6),
            evaluation_tasks=100,
        ),
    )
