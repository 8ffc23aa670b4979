"""The SWE environment as training sees it: tasks are kept in the run, and Docker is opened for episodes only."""

import json
from contextlib import ExitStack

import pytest

from megatron_dagger.config import ConfigError, ModelConfig, RunConfig, SweConfig, TeacherConfig
from megatron_dagger.envs.environment import EnvironmentContext
from megatron_dagger.envs.swe.load import load_environment, read_kept
from megatron_dagger.observability.progress import track
from megatron_dagger.sandbox.base import EnvironmentBroken
from tests.unit.envs.swe.rows import BENCH, GYM, PATCH

TRAIN = {**GYM, "instance_id": "org__pkg-99", "base_commit": "1" * 40, "patch": PATCH + "+y = 1\n"}


def context(folder, stack, **swe):
    config = RunConfig(
        swe=SweConfig(
            train=str(folder / "gym.jsonl"), heldout=str(folder / "bench.jsonl"),
            docker_url=f"unix://{folder}/no-daemon.sock", **swe,
        ),
        teacher=TeacherConfig(urls=("http://teacher/v1",), model="m"),
        model=ModelConfig(),
        init_checkpoint="checkpoint",
    )  # fmt: skip
    return EnvironmentContext(config=config, run_dir=folder / "run", cache_dir=folder, track=track, stack=stack)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "gym.jsonl").write_text(json.dumps(TRAIN) + "\n")
    (tmp_path / "bench.jsonl").write_text(json.dumps(BENCH) + "\n")
    return tmp_path


def test_a_run_needs_its_data_sets_once_and_docker_for_episodes_only(folder):
    with ExitStack() as stack:
        first = load_environment(context(folder, stack))
        first.prepare(folder / "run" / "tasks")
        for name in ("gym.jsonl", "bench.jsonl"):
            (folder / name).unlink()
        later = load_environment(context(folder, stack))
        assert (later.train_tasks, later.heldout_tasks) == (first.train_tasks, first.heldout_tasks)
        assert later.train_tasks == (TRAIN["instance_id"],)
        for use in (lambda: later.make_env(later.train_tasks[0]), lambda: later.prefetch(later.train_tasks)):
            with pytest.raises(EnvironmentBroken, match="the Docker daemon cannot be reached"):
                use()


def test_kept_tasks_are_the_tasks_that_were_read(folder):
    from megatron_dagger.envs.swe.load import load_tasks

    with ExitStack() as stack:
        prepared = context(folder, stack)
        load_environment(prepared).prepare(folder)
    train, heldout = load_tasks(prepared.config.swe)
    assert read_kept(folder / "train.jsonl") == train
    assert read_kept(folder / "heldout.jsonl") == heldout


def test_a_spoilt_line_is_named(folder):
    (folder / "train.jsonl").write_text('{"instance_id": "a"}\n')
    with pytest.raises(ConfigError, match=r"train\.jsonl:1 is not a task"):
        read_kept(folder / "train.jsonl")
