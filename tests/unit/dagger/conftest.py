"""A run's context without engines."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

pytest.importorskip("zarr")
pytest.importorskip("tokenizers")

from megatron_dagger.config import DaggerConfig, RunConfig
from megatron_dagger.dagger.context import RunContext
from megatron_dagger.observability.metrics import StageMetrics
from megatron_dagger.observability.progress import track
from megatron_dagger.observability.status_file import RunProcess
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.store.aggregated import DataStore
from tests.unit.dagger.one_step_env import TASKS, EnvFactory, Student
from tools.support.scripted_policies import RandomPolicy


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["submit a b c d"], 300, folder)
    return ChatRenderer.load(folder)


@pytest.fixture
def context(renderer, tmp_path):
    factory, seeds = EnvFactory(), []

    class RecordingPolicy(RandomPolicy):
        async def act(self, state):
            seeds.append((state.messages[1].content, state.seed))
            return await super().act(state)

    policy = RecordingPolicy(["a", "b", "c", "d"], renderer.action)
    with ThreadPoolExecutor(4) as threads:
        context = RunContext(
            config=RunConfig(dagger=DaggerConfig(rounds=0, sft_tasks=8, evaluation_tasks=4)),
            run_dir=tmp_path,
            renderer=renderer,
            train_tasks=TASKS,
            heldout_tasks=TASKS[:4],
            make_env=factory.make_env,
            prefetch=lambda tasks: None,
            teacher=policy,
            score=None,
            student=lambda: Student(policy),
            data=DataStore.create_or_open(tmp_path / "data.zarr"),
            evaluations=DataStore.create_or_open(tmp_path / "evaluations.zarr"),
            references=DataStore.create_or_open(tmp_path / "references.zarr"),
            takeovers=DataStore.create_or_open(tmp_path / "takeovers.zarr"),
            metrics=StageMetrics(tmp_path),
            train=lambda index: None,
            track=partial(track, process=RunProcess(run_dir=tmp_path)),
            threads=threads,
        )
        yield context, factory, seeds
