"""The nearest settings that fit."""

import pytest

from megatron_dagger.config import override
from megatron_dagger.planning import GPUS, Assumptions, nearest_that_fits
from megatron_dagger.recipes import find_recipe

H100 = GPUS["h100"]


def nearest(recipe, *settings, gpu=H100, **assumed):
    return nearest_that_fits(override(find_recipe(recipe)(), list(settings)), gpu, Assumptions(**assumed))


def test_nothing_changes_if_everything_fits():
    change = nearest("qwen3_4b_swegym_8h100")
    assert change is not None
    assert change.settings == ()


@pytest.mark.parametrize(
    "settings",
    [
        ["training.parallel.tensor_model_parallel_size=4"],
        ["training.parallel.tensor_model_parallel_size=1", "training.parallel.sequence_parallel=false"],
        ["training.parallel.tensor_model_parallel_size=2", "training.parallel.pipeline_model_parallel_size=2"],
        ["rollout.engine.kv_cache_memory_mib=100"],
        ["rollout.engine.tensor_parallel_size=1", "rollout.engine.gpu_memory_utilization=0.3"],
        ["training.optimizer.distributed=false", "training.parallel.tensor_model_parallel_size=2"],
    ],
)
def test_the_change_fits_on_as_many_gpus_and_trains_the_same(settings):
    requested = override(find_recipe("qwen3_8b_swegym_8h100")(), settings)
    change = nearest("qwen3_8b_swegym_8h100", *settings)
    assert change is not None
    assert change.settings
    assert change.memory.problems() == []
    assert change.config == override(requested, list(change.settings))
    assert change.config.training.parallel.world_size == requested.training.parallel.world_size
    assert change.config.training.sequence_length == requested.training.sequence_length


def test_a_single_change_is_preferred():
    change = nearest("qwen3_8b_swegym_8h100", "training.parallel.tensor_model_parallel_size=4")
    assert change is not None
    assert len(change.settings) == 1


def test_experts_are_distributed_if_they_do_not_fit():
    whole = ["training.parallel.expert_model_parallel_size=1"]
    change = nearest("qwen3_30b_a3b_swegym_4x8h100", *whole)
    assert change is not None
    assert change.settings == ("training.parallel.expert_model_parallel_size=4",)
    assert change.memory.problems() == []


def test_a_longer_pipeline_takes_ranks_from_the_experts():
    spread = ["training.parallel.expert_model_parallel_size=32"]  # over all ranks of the one stage
    change = nearest("qwen3_30b_a3b_swegym_4x8h100", *spread, reserve_gib=45.0)
    assert change is not None
    parallel = change.config.training.parallel
    assert (parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size) == (2, 16)


def test_a_shorter_sequence_is_the_last_resort_and_lowers_the_limit_of_episodes():
    change = nearest("smollm2_135m_repair_1gpu", "training.recompute=full", reserve_gib=75.0)
    assert change is not None
    assert {"training.sequence_length", "rollout.limits.max_tokens"} == {s.split("=")[0] for s in change.settings}


def test_nothing_fits_a_gpu_that_is_full():
    assert nearest("smollm2_135m_repair_1gpu", reserve_gib=79.0) is None
