"""Broken episodes: retried, first with the same draws, then abandoned for the round; too many of them stop the run."""

import asyncio
import json
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("httpx")

from megatron_dagger.config import TeacherConfig
from megatron_dagger.dagger.collect import TRIES, TooManyBroken
from megatron_dagger.dagger.context import train_manifest
from megatron_dagger.dagger.loop import collect, evaluate
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.envs.environment import last_line
from megatron_dagger.policies.base import PolicyGone
from megatron_dagger.policies.openai.cache import ResponseCache
from megatron_dagger.policies.openai.endpoint_pool import EndpointPool
from megatron_dagger.policies.openai.policy import EndpointPolicy
from megatron_dagger.rollout.episode import EpisodeKey
from megatron_dagger.store.atomic import write_json
from tests.unit.dagger.one_step_env import TASKS
from tools.support.chat_server import chat_server


def run(context, worker=None):
    asyncio.run(collect(context, 0, worker))


def report(context, name="collect"):
    return json.loads((context.round_dir(0) / f"{name}.json").read_text())


def test_a_task_that_breaks_every_time_is_abandoned_and_the_others_become_data(context):
    context, factory, seeds = context
    factory.memory_errors = {TASKS[3]: 99}
    run(context)
    values = report(context)
    assert (values["episodes"], values["broken_episodes"], values["given_up"]) == (7, TRIES, 1)
    assert {task for task, _ in context.data.committed(0)} == set(TASKS) - {TASKS[3]}
    draws = [seed for task, seed in seeds if task == TASKS[3]]
    assert draws[0] == draws[1] != draws[2], "one retry with the same draws, then one with new draws"
    assert draws[0] == EpisodeKey(run_seed=context.config.seed, round_index=0, task_id=TASKS[3]).seed(0)


def test_an_episode_that_broke_once_keeps_its_key(context):
    context, factory, _ = context
    factory.memory_errors = {TASKS[3]: 1, TASKS[4]: TRIES - 1}
    run(context)
    values = report(context)
    assert (values["episodes"], values["broken_episodes"], values["given_up"]) == (8, TRIES, 0)
    assert context.data.committed(0) == {(task, 0) for task in TASKS}


def test_seeds_never_change():
    assert EpisodeKey(run_seed=7, round_index=1, task_id="t").seed(2) == 449093112517334062


@pytest.mark.parametrize("resident", [False, True])
def test_other_workers_and_a_restart_skip_abandoned_tasks(context, resident):
    context, factory, _ = context
    factory.memory_errors = {TASKS[3]: 99}
    for index in (1, 0):
        run(context, Worker(index=index, count=2, resident=resident))
    if not resident:
        run(context)
    values = report(context)
    assert (values["episodes"], values["broken_episodes"], values["given_up"]) == (7, TRIES, 1)
    assert len(factory.opened) == 7 + TRIES


@pytest.mark.parametrize("failing", [TASKS[:3], TASKS])
def test_many_broken_tasks_stop_the_run_and_are_retried_later(context, failing):
    context, factory, _ = context
    factory.memory_errors = dict.fromkeys(failing, 99)
    with pytest.raises(TooManyBroken, match=r"3 of 8 tasks broke 3 times each.*out_of_memory: over 512 MiB"):
        run(context)
    assert not (context.round_dir(0) / "collect.json").exists()
    factory.memory_errors = {}
    run(context)
    assert (report(context)["episodes"], report(context)["given_up"]) == (8, 0)


def test_a_broken_heldout_task_counts_as_unsolved(context):
    context, factory, _ = context
    factory.memory_errors = {TASKS[3]: 99}
    manifest = {"canary": {"tokens": [1, 2], "logprobs": [-1.0]}, "checkpoint": "checkpoint", "digests": {}}
    write_json(train_manifest(context.run_dir, 0), manifest)
    asyncio.run(evaluate(context, 0))
    values = report(context, "evaluate")["heldout"]
    assert (values["tasks"], values["solved"], values["given_up"], values["success"]) == (4, 3, 1, 0.75)


@contextmanager
def taught_by(server, context, folder):
    """Yield the context with the model behind ``server`` as its teacher."""
    config = TeacherConfig(urls=(server.url,), model="m", patience_s=1.0)
    with closing(ResponseCache(folder)) as cache, EndpointPool(config, cache) as pool:
        policy = EndpointPolicy(config, pool, cache, read=last_line, encode=context.renderer.action)
        yield replace(context, teacher=policy)


def test_a_teacher_without_an_action_for_one_task_does_not_block_the_run(context, tmp_path):
    context, _, _ = context

    def answer(request):
        return "" if request["messages"][1]["content"] == TASKS[3] else "submit"

    with chat_server(answer) as server:
        with taught_by(server, context, tmp_path / "teacher") as context:
            run(context)
        values = report(context)
        assert (values["episodes"], values["given_up"]) == (7, 1)
        assert len(server.requests) == 7 + (TRIES - 1) * 4, "new draws ask again, the same draws use the cache"


def test_a_teacher_that_is_gone_stops_the_run_and_abandons_no_task(context, tmp_path):
    context, factory, _ = context
    with (
        chat_server(lambda request: 503) as server,
        taught_by(server, context, tmp_path / "teacher") as context,
        pytest.raises(PolicyGone, match="no teacher answered within 1 s"),
    ):
        run(context)
    assert len(factory.opened) == len(set(factory.opened)), "no task is tried twice"
    assert not context.data.abandoned(0).tasks()
