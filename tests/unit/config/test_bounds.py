"""Every numeric setting has a range, checked before any arithmetic; errors give the whole name and the value."""

import dataclasses
import math
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.config import (
    ConfigError,
    LimitsConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SamplingConfig,
    VllmEngineConfig,
    YarnConfig,
    override,
)

UNBOUNDED = {"swe.heldout_seed"}
CONFIG = RunConfig(model=ModelConfig(yarn=YarnConfig()))
EXPERTS = ModelConfig(
    family="qwen3_moe", num_moe_experts=4, moe_ffn_hidden_size=96, moe_router_topk=2, yarn=YarnConfig()
)
BAD = {
    "seed": -1,
    "repo_repair.terse": 1.5,
    "repo_repair.bugs": 10,
    "repo_repair.train_tasks": -5,
    "repo_repair.heldout_tasks": 0,
    "repo_repair.repeats": 1,
    "repo_repair.suspects": 0,
    "repo_repair.fewest_repairs": -1,
    "repo_repair.most_repairs": -1,
    "road.stops": -1,
    "road.train_tasks": 0,
    "road.heldout_tasks": 0,
    "swe.heldout_of_train": -1,
    "swe.image_budget_mib": 0,
    "swe.cpus": 0.0,
    "swe.memory_mib": 0,
    "swe.disk_mib": -1,
    "swe.processes": 0,
    "swe.command_timeout_s": 0.0,
    "swe.observation_characters": 0,
    "model.num_layers": 0,
    "model.hidden_size": 0,
    "model.ffn_hidden_size": 0,
    "model.num_attention_heads": 0,
    "model.num_query_groups": 0,
    "model.kv_channels": 0,
    "model.vocab_size": 0,
    "model.max_position_embeddings": 0,
    "model.rotary_base": 1,
    "model.yarn.factor": 1.0,
    "model.yarn.original_max_position_embeddings": 0,
    "model.yarn.beta_fast": 0.0,
    "model.yarn.beta_slow": -1.0,
    "model.layernorm_epsilon": 0.0,
    "model.init_std": -0.02,
    "model.num_moe_experts": 0,
    "model.moe_ffn_hidden_size": 0,
    "model.moe_router_topk": 0,
    "training.parallel.world_size": 0,
    "training.parallel.nodes": 0,
    "training.parallel.tensor_model_parallel_size": 0,
    "training.parallel.pipeline_model_parallel_size": 0,
    "training.parallel.virtual_pipeline_model_parallel_size": 0,
    "training.parallel.context_parallel_size": 0,
    "training.parallel.expert_model_parallel_size": 0,
    "training.parallel.expert_tensor_parallel_size": -1,
    "training.optimizer.lr": 0.0,
    "training.optimizer.min_lr": -0.1,
    "training.optimizer.warmup_steps": -1,
    "training.optimizer.weight_decay": -0.01,
    "training.optimizer.adam_beta1": 1.0,
    "training.optimizer.adam_beta2": -0.1,
    "training.optimizer.adam_eps": 0.0,
    "training.optimizer.clip_grad": -1.0,
    "training.optimizer.cpu_offload_fraction": 1.5,
    "training.bf16_layers_at_ends": -1,
    "training.epochs": math.inf,
    "training.max_steps": 0,
    "training.max_sft_steps": 0,
    "training.sequence_length": 0,
    "training.global_batch_tokens": 0,
    "training.checkpoint_interval": 0,
    "training.threads_per_process": 0,
    "training.deadline_s": -1.0,
    "training.collective_timeout_s": 0.0,
    "rollout.sampling.temperature": -0.1,
    "rollout.sampling.top_p": 0.0,
    "rollout.sampling.max_tokens": 0,
    "rollout.engine.tensor_parallel_size": 0,
    "rollout.engine.max_model_len": 0,
    "rollout.engine.max_num_seqs": 0,
    "rollout.engine.kv_cache_memory_mib": 0,
    "rollout.engine.gpu_memory_utilization": 90.0,
    "rollout.engine.threads": 0,
    "rollout.engine.start_deadline_s": 0.0,
    "rollout.engine.request_deadline_s": math.nan,
    "rollout.limits.max_turns": 0,
    "rollout.limits.max_tokens": 0,
    "rollout.limits.max_repeats": 0,
    "rollout.limits.max_format_errors": 0,
    "rollout.limits.max_seconds": 0.0,
    "rollout.concurrent_episodes": 0,
    "rollout.stage_deadline_s": -1.0,
    "teacher.sampling.temperature": -0.1,
    "teacher.sampling.top_p": 1.1,
    "teacher.sampling.max_tokens": -1,
    "teacher.concurrent_requests": 0,
    "teacher.request_timeout_s": 0.0,
    "teacher.patience_s": -1.0,
    "teacher.malformed_retries": -1,
    "teacher.token_budget": -1,
    "teacher.price_per_million_prompt_tokens": -0.5,
    "teacher.price_per_million_completion_tokens": -0.5,
    "teacher.money_budget": -1.0,
    "evaluation_sampling.temperature": -0.1,
    "evaluation_sampling.top_p": 0.0,
    "evaluation_sampling.max_tokens": 0,
    "dagger.rounds": -1,
    "dagger.tasks_per_round": 0,
    "dagger.sft_tasks": 0,
    "dagger.beta.start": 1.1,
    "dagger.beta.floor": -0.1,
    "dagger.beta.decay": 1.1,
    "dagger.beta.step_rounds": 0,
    "dagger.beta.horizon_rounds": 0,
    "dagger.beta.warmup_rounds": -1,
    "dagger.prefix_turns_per_round": -1,
    "dagger.prefix_turns_limit": -1,
    "dagger.takeover_turns": -1,
    "dagger.aggregation.last_rounds": 0,
    "dagger.aggregation.max_labels_per_round": 0,
    "dagger.aggregation.max_sft_labels": 0,
    "dagger.aggregation.disagreement_weight": 0.0,
    "dagger.evaluation_tasks": -3,
    "dagger.evaluation_train_tasks": -1,
}


def numeric_settings(cls, prefix=""):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kinds = set(typing.get_args(hints[field.name])) | {hints[field.name]}
        for group in filter(dataclasses.is_dataclass, kinds):
            yield from numeric_settings(group, f"{prefix}{field.name}.")
        if kinds & {int, float}:
            yield prefix + field.name, field, int if int in kinds else float


NUMERIC = {name: (field, kind) for name, field, kind in numeric_settings(RunConfig)}


def test_every_numeric_setting_has_a_range():
    assert {name for name, (field, _) in NUMERIC.items() if "bounds" not in field.metadata} == UNBOUNDED
    assert set(BAD) == set(NUMERIC) - UNBOUNDED


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_value_out_of_range_is_refused_by_its_whole_name(name, value):
    with pytest.raises(ConfigError, match=f"^{re.escape(f'{name}={value}')} must "):
        override(CONFIG, [f"{name}={value}"])


@pytest.mark.parametrize("config", [CONFIG, RunConfig(model=EXPERTS)], ids=["dense", "experts"])
@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(NUMERIC)),
    number=st.one_of(st.integers(-3, 100), st.integers(-(2**70), 2**70), st.floats()),
)
def test_no_number_raises_anything_but_a_config_error(config, name, number):
    try:
        changed = override(config, [f"{name}={number}"])
    except ConfigError:
        return
    for part in name.split("."):
        changed = getattr(changed, part)
    assert changed == NUMERIC[name][1](number)  # a float setting rounds a long integer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParallelConfig(world_size=0), r"^training\.parallel\.world_size=0 must be positive$"),
        (lambda: LimitsConfig(max_tokens=-1), r"^rollout\.limits\.max_tokens=-1 must be positive$"),
        (lambda: SamplingConfig(max_tokens=0), r"^sampling\.max_tokens=0 must be positive$"),
        (lambda: VllmEngineConfig(gpu_memory_utilization=90), r"gpu_memory_utilization=90 must lie in \(0, 1\]$"),
        (lambda: RunConfig(seed=2**63), r"^seed=9223372036854775808 must not exceed 9223372036854775807$"),
    ],
)
def test_ranges_hold_for_configs_built_in_python(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "assignment", "message"),
    [
        (CONFIG, "training.parallel.nodes=2", r"nodes=2 does not divide training\.parallel\.world_size=1"),
        (CONFIG, "repo_repair.fewest_repairs=12", r"must not exceed repo_repair\.most_repairs=11"),
        (CONFIG, "training.optimizer.min_lr=1", r"min_lr=1\.0 must not exceed training\.optimizer\.lr=0\.002"),
        (CONFIG, "model.yarn.beta_fast=1", r"must be greater than model\.yarn\.beta_slow=1\.0"),
        (CONFIG, "rollout.engine.tensor_parallel_size=3", r"does not divide model\.num_attention_heads=4"),
        (CONFIG, "model.ffn_hidden_size=383", None),
        (RunConfig(model=EXPERTS), "rollout.engine.quantization=fp8", r"quantization=fp8 (is for dense|needs)"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, assignment, message):
    if message is None:
        override(config, [assignment])
        with pytest.raises(ConfigError, match=r"tensor_parallel_size=2 does not divide model\.ffn_hidden_size=383"):
            override(config, [assignment, "rollout.engine.tensor_parallel_size=2"])
        return
    with pytest.raises(ConfigError, match=message):
        override(config, [assignment])


@pytest.mark.parametrize(
    "assignment",
    [
        "training.optimizer.warmup_steps=0",
        "training.optimizer.weight_decay=0",
        "training.optimizer.clip_grad=0",
        "training.max_steps=null",
        "dagger.beta.decay=0",
        "dagger.rounds=0",
        "dagger.evaluation_tasks=0",
        "dagger.evaluation_tasks=100000",
        "rollout.engine.kv_cache_memory_mib=null",
        "rollout.engine.tensor_parallel_size=4",
        "teacher.malformed_retries=0",
        "teacher.token_budget=0",
    ],
)
def test_values_that_switch_something_off_or_have_no_limit_are_allowed(assignment):
    override(CONFIG, [assignment])
