"""metrics.jsonl, the job file and the episodes file: what is read is what was written."""

import json

import numpy as np
import pytest

from megatron_dagger.config import ConfigError, ModelConfig, ParallelConfig, TrainingConfig
from megatron_dagger.training.data.episode_file import load_episodes, save_episodes
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.metrics import Metrics, read
from megatron_dagger.types import LabelledEpisode, StateLabel

LINE = {"grad_norm": 1.0, "lr": 1e-3, "label_tokens": 3, "tokens": 10, "places": 16, "step_s": 0.5}


def test_a_resumed_file_repeats_and_loses_nothing(tmp_path):
    first = Metrics(tmp_path, 4)
    first.begin(0)
    for step in (1, 2, 3):
        first.add(step=step, loss=float(step), **LINE)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    again = Metrics(tmp_path, 4)
    again.begin(2)
    for step in (3, 4):
        again.add(step=step, loss=10.0 * step, **LINE)
    again.close()
    assert [(x["step"], x["loss"]) for x in read(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
    ]
    summary = again.summary()
    assert (summary["steps"], summary["first_loss"], summary["last_loss"]) == (4, 1.0, 40.0)
    assert (summary["tokens"], summary["tokens_per_s"], summary["fill"]) == (40, 20.0, 10 / 16)
    assert summary["mean_loss_last_10"] == pytest.approx(18.25)


def test_a_job_survives_its_file_and_an_unknown_field_is_named(tmp_path):
    training = TrainingConfig(parallel=ParallelConfig(world_size=2, tensor_model_parallel_size=2))
    job = TrainJob(round_index=3, seed=5, model=ModelConfig(), training=training, output_dir="x")
    job.save(tmp_path / "job.json")
    assert TrainJob.load(tmp_path / "job.json") == job
    values = json.loads((tmp_path / "job.json").read_text())
    (tmp_path / "job.json").write_text(json.dumps({**values, "sed": 1}))
    with pytest.raises(ConfigError, match="sed; did you mean seed"):
        TrainJob.load(tmp_path / "job.json")


def test_episodes_survive_their_file(tmp_path):
    rng = np.random.default_rng(0)
    episodes = []
    for labels in (2, 0, 1):
        tokens = rng.integers(0, 9, 12).astype(np.int32)
        made = tuple(StateLabel(position=3 + i, tokens=tokens[:2], weight=0.3 + i) for i in range(labels))
        episodes.append(LabelledEpisode(tokens=tokens, labels=made))
    save_episodes(tmp_path / "e.npz", episodes)
    again = load_episodes(tmp_path / "e.npz")
    assert len(again) == 3
    for ours, theirs in zip(again, episodes, strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert [(x.position, x.weight, list(x.tokens)) for x in ours.labels] == [
            (x.position, x.weight, list(x.tokens)) for x in theirs.labels
        ]


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused():
    training = TrainingConfig(parallel=ParallelConfig(world_size=3, tensor_model_parallel_size=3))
    with pytest.raises(ConfigError, match=r"=3 does not divide model\.num_attention_heads=4"):
        TrainJob(round_index=0, seed=1, model=ModelConfig(), training=training, output_dir="x")
