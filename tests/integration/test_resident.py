"""The resident mode with real processes: a trainer and two workers run all rounds, and one worker is killed."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from megatron_dagger.config import override
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.recipes.short_repair import short_repair
from tests.integration.tiny_run import (
    DEADLINE_S,
    SETTINGS,
    assert_same,
    assert_same_evaluations,
    environment,
    losses,
    writers,
)

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@contextlib.contextmanager
def started(run, log, environment, command, *options):
    """Run a resident process while the block runs."""
    argv = [sys.executable, "-m", "megatron_dagger.cli.main", command, str(run), "--resident", *options]
    with log.open("ab") as output:
        process = subprocess.Popen(argv, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_weights_come_from_the_trainers_memory_in_all_rounds_and_a_killed_worker_resumes(undisturbed, cache, tmp_path):
    run, env = tmp_path / "run", {**environment(cache), "GLOO_SOCKET_IFNAME": "lo"}
    logs = {name: tmp_path / f"{name}.log" for name in ("trainer", "first", "second")}
    create_run(override(short_repair(), SETTINGS), run)

    def wait(condition, *processes):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            for process in processes:
                assert process.poll() is None, "".join(log.read_text()[-3000:] for log in logs.values())
            assert time.monotonic() < deadline
            time.sleep(0.05)

    with (
        started(run, logs["trainer"], env, "train") as trainer,
        started(run, logs["first"], env, "rollout", "--worker", "0/2") as first,
    ):
        with started(run, logs["second"], env, "rollout", "--worker", "1/2") as second:
            wait(lambda: "weights 0: " in logs["second"].read_text(), trainer, first, second)
            second.send_signal(signal.SIGKILL)
        with started(run, logs["second"], env, "rollout", "--worker", "1/2") as restarted:
            for process in (restarted, first, trainer):
                assert process.wait(DEADLINE_S) == 0, "".join(log.read_text()[-3000:] for log in logs.values())

    assert_same(run, undisturbed)
    assert_same_evaluations(run, undisturbed)
    status = json.loads((run / "status/0001-train-trainer.json").read_text())
    assert (status["state"], status["done"]) == ("done", len(losses(run, 1)))
    assert (run / "metrics.jsonl").read_text().count("\n") == 6
    rank = (run / "logs/train/rank-0.log").read_text()
    assert rank.count("a rollout engine took weights 0 (shared_memory)") >= 2
    assert rank.count("a rollout engine took weights 1 (shared_memory)") == 2
    assert "come from the checkpoint" not in logs["first"].read_text()
    assert not [pid for log in run.glob("logs/**/*.log") for pid in writers(log)]
