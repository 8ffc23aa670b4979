"""Episodes that break: tried anew with other draws, then given up for the round, and when the run stops instead."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace

import pytest

pytest.importorskip("zarr")
pytest.importorskip("tokenizers")
pytest.importorskip("httpx")

from megatron_dagger.config import DaggerConfig, RunConfig, TeacherConfig
from megatron_dagger.dagger.collect import TRIES, TooManyBroken
from megatron_dagger.dagger.context import RunContext, train_manifest
from megatron_dagger.dagger.loop import collect, evaluate
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.driver.environments import last_line
from megatron_dagger.envs.base import EnvironmentBroken, Observation
from megatron_dagger.observability.metrics import Metrics
from megatron_dagger.observability.progress import track
from megatron_dagger.policies.base import PolicyGone
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.rollout.chat import ChatRenderer
from megatron_dagger.rollout.episode import EpisodeKey
from megatron_dagger.rollout.tokenizer import train_tokenizer
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.atomic import write_json
from megatron_dagger.types import StopReason
from tools.support.chat_server import chat_server
from tools.support.scripted_policies import RandomPolicy

TASKS = tuple(f"owner/task-{number}" for number in range(8))


@dataclass
class Place:
    """An environment of one step a task, which runs out of memory in ``hungry`` tasks, so many times."""

    hungry: dict[str, int] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    def make_env(self, task_id):
        self.opened.append(task_id)
        return Env(task_id, self)


@dataclass
class Env:
    task_id: str
    place: Place

    def reset(self):
        return "be an agent", self.task_id

    def step(self, command):
        if self.place.hungry.get(self.task_id, 0):
            self.place.hungry[self.task_id] -= 1
            raise EnvironmentBroken("over 512 MiB", StopReason.OUT_OF_MEMORY)
        return Observation(text="", done=True)

    def judge(self):
        return True

    def report(self):
        return {}

    def close(self):
        pass


class Student:
    """Serves any weights."""

    def __init__(self, policy):
        self.policy = policy

    def with_sampling(self, sampling):
        return self.policy

    def sync(self, *arguments):
        pass


@pytest.fixture(scope="module")
def renderer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["submit a b c d"], 300, folder)
    return ChatRenderer.load(folder)


@pytest.fixture
def context(renderer, tmp_path):
    place, seeds = Place(), []

    class Noted(RandomPolicy):
        async def act(self, state):
            seeds.append((state.messages[1].content, state.seed))
            return await super().act(state)

    policy = Noted(["a", "b", "c", "d"], renderer.action)
    with ThreadPoolExecutor(4) as threads:
        made = RunContext(
            config=RunConfig(dagger=DaggerConfig(rounds=0, sft_tasks=8, evaluation_tasks=4)),
            run_dir=tmp_path,
            renderer=renderer,
            train_tasks=TASKS,
            heldout_tasks=TASKS[:4],
            make_env=place.make_env,
            prefetch=lambda tasks: None,
            teacher=policy,
            score=None,
            student=lambda: Student(policy),
            data=DataStore.create_or_open(tmp_path / "data.zarr"),
            evaluations=DataStore.create_or_open(tmp_path / "evaluations.zarr"),
            metrics=Metrics(tmp_path),
            train=lambda index: None,
            track=track,
            threads=threads,
        )
        yield made, place, seeds


def run(context, worker=None):
    asyncio.run(collect(context, 0, worker))


def report(context, name="collect"):
    return json.loads((context.round_dir(0) / f"{name}.json").read_text())


def test_a_task_that_breaks_each_time_is_given_up_and_the_others_are_data(context):
    context, place, seeds = context
    place.hungry = {TASKS[3]: 99}
    run(context)
    found = report(context)
    assert (found["episodes"], found["broken_episodes"], found["given_up"]) == (7, TRIES, 1)
    assert {task for task, _ in context.data.committed(0)} == set(TASKS) - {TASKS[3]}
    drawn = [seed for task, seed in seeds if task == TASKS[3]]
    assert drawn[0] == drawn[1] != drawn[2], "once more as it was, then with other draws"
    assert drawn[0] == EpisodeKey(run_seed=context.config.seed, round_index=0, task_id=TASKS[3]).seed(0)


def test_what_broke_once_has_the_name_of_a_first_try(context):
    context, place, _ = context
    place.hungry = {TASKS[3]: 1, TASKS[4]: TRIES - 1}
    run(context)
    found = report(context)
    assert (found["episodes"], found["broken_episodes"], found["given_up"]) == (8, TRIES, 0)
    assert context.data.committed(0) == {(task, 0) for task in TASKS}


def test_a_first_try_draws_what_it_always_did():
    assert EpisodeKey(run_seed=7, round_index=1, task_id="t").seed(2) == 449093112517334062


@pytest.mark.parametrize("resident", [False, True])
def test_other_workers_and_a_restart_know_what_is_given_up(context, resident):
    context, place, _ = context
    place.hungry = {TASKS[3]: 99}
    for index in (1, 0):
        run(context, Worker(index=index, count=2, resident=resident))
    if not resident:
        run(context)
    found = report(context)
    assert (found["episodes"], found["broken_episodes"], found["given_up"]) == (7, TRIES, 1)
    assert len(place.opened) == 7 + TRIES


@pytest.mark.parametrize("hungry", [TASKS[:3], TASKS])
def test_where_many_break_the_run_stops_and_once_that_is_mended_misses_nothing(context, hungry):
    context, place, _ = context
    place.hungry = dict.fromkeys(hungry, 99)
    with pytest.raises(TooManyBroken, match=r"3 of 8 tasks broke 3 times each.*out_of_memory: over 512 MiB"):
        run(context)
    assert not (context.round_dir(0) / "collect.json").exists()
    place.hungry = {}
    run(context)
    assert (report(context)["episodes"], report(context)["given_up"]) == (8, 0)


def test_a_heldout_task_that_breaks_counts_as_not_solved(context):
    context, place, _ = context
    place.hungry = {TASKS[3]: 99}
    manifest = {"canary": {"tokens": [1, 2], "logprobs": [-1.0]}, "checkpoint": "checkpoint", "digests": {}}
    write_json(train_manifest(context.run_dir, 0), manifest)
    asyncio.run(evaluate(context, 0))
    found = report(context, "evaluate")["heldout"]
    assert (found["tasks"], found["solved"], found["given_up"], found["success"]) == (4, 3, 1, 0.75)


def endpoint(context, folder, server):
    replies = ResponseCache(folder)
    config = TeacherConfig(urls=(server.url,), model="m", patience_s=1.0)
    policy = EndpointPolicy(config, replies, read=last_line, encode=context.renderer.action)
    return closing(replies), replace(context, teacher=policy)


def test_a_teacher_without_an_action_for_one_task_does_not_block_the_run(context, tmp_path):
    context, _, _ = context

    def answer(request):
        return "" if request["messages"][1]["content"] == TASKS[3] else "submit"

    with chat_server(answer) as server:
        replies, context = endpoint(context, tmp_path / "teacher", server)
        with replies:
            run(context)
        found = report(context)
        assert (found["episodes"], found["given_up"]) == (7, 1)
        assert len(server.requests) == 7 + (TRIES - 1) * 4, "each draw asks anew; the same one does not"


def test_where_the_teacher_is_gone_the_run_stops_at_once_and_nothing_is_given_up(context, tmp_path):
    context, place, _ = context
    with chat_server(lambda request: 503) as server:
        replies, context = endpoint(context, tmp_path / "teacher", server)
        with replies, pytest.raises(PolicyGone, match="no teacher answered within 1 s"):
            run(context)
    assert len(place.opened) == len(set(place.opened)), "no task is tried twice"
    assert not context.data.given_up(0).tasks()
