"""A TrainJob: its file, and the settings that it refuses."""

import json

import pytest

from megatron_dagger.config import ConfigError, ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.job import TrainJob


def test_a_job_is_unchanged_after_a_round_trip_and_an_unknown_field_is_named(tmp_path):
    training = TrainingConfig(parallel=ParallelConfig(world_size=2, tensor_model_parallel_size=2))
    job = TrainJob(round_index=3, seed=5, model=ModelConfig(), training=training, output_dir="x")
    job.save(tmp_path / "job.json")
    assert TrainJob.load(tmp_path / "job.json") == job
    values = json.loads((tmp_path / "job.json").read_text())
    (tmp_path / "job.json").write_text(json.dumps({**values, "sed": 1}))
    with pytest.raises(ConfigError, match="sed; did you mean seed"):
        TrainJob.load(tmp_path / "job.json")


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused():
    training = TrainingConfig(parallel=ParallelConfig(world_size=3, tensor_model_parallel_size=3))
    with pytest.raises(ConfigError, match=r"=3 does not divide model\.num_attention_heads=4"):
        TrainJob(round_index=0, seed=1, model=ModelConfig(), training=training, output_dir="x")
