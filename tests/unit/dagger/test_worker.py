"""Workers: every task belongs to exactly one of them, the same one each time."""

import itertools

import pytest

from megatron_dagger.config import ConfigError
from megatron_dagger.dagger.worker import Worker, recorded_by_workers


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_task_has_one_worker(count):
    tasks = [f"task-{number}" for number in range(7)]
    shares = [Worker(index=index, count=count).share(tasks) for index in range(count)]
    assert sorted(itertools.chain(*shares)) == tasks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_worker_is_written_as_index_and_count():
    worker = Worker.parse("3/4")
    assert (worker.index, worker.count, worker.name) == (3, 4, "worker-3")


def test_only_the_first_resident_worker_seals():
    assert [Worker.parse(f"{index}/3", resident=True).seals for index in range(3)] == [True, False, False]
    assert not Worker.parse("0/3").seals


@pytest.mark.parametrize("text", ["4/4", "0/0", "1", "a/b", "-1/2", "/"])
def test_an_impossible_worker_is_refused(text):
    with pytest.raises(ConfigError, match="worker"):
        Worker.parse(text)


def test_records_add_up_over_workers_and_restarts(tmp_path):
    report = tmp_path / "collect.json"
    assert recorded_by_workers(report) == (0, 0.0)
    first, second = (Worker(index=index, count=2) for index in (0, 1))
    first.record(report, broken_episodes=2, duration_s=10.0)
    second.record(report, broken_episodes=1, duration_s=4.0)
    second.record(report, broken_episodes=0, duration_s=8.0)
    assert recorded_by_workers(report) == (3, 12.0)
