"""Whole DAgger rounds with Megatron-Core, vLLM and sandboxes: their outputs, and their recovery from kills."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.cli.replay import replay
from megatron_dagger.config import override
from megatron_dagger.driver.context import TEACHER_URLS
from megatron_dagger.driver.run_dir import create_run
from megatron_dagger.evaluation.drift import states_off_path
from megatron_dagger.recipes.short_repair import short_repair
from megatron_dagger.store.aggregated import DataStore
from tests.integration.tiny_run import (
    DEADLINE_S,
    SETTINGS,
    assert_same,
    assert_same_evaluations,
    command,
    drift,
    environment,
    manifest,
    writers,
)
from tools.support.chat_server import chat_server, expert

pytestmark = pytest.mark.timeout(900)


def test_every_stage_writes_its_reports(undisturbed):
    for round_index in (0, 1):
        folder = undisturbed / "rounds" / f"{round_index:04d}"
        collect = json.loads((folder / "collect.json").read_text())
        evaluate = json.loads((folder / "evaluate.json").read_text())
        assert collect["labelled_turns"] == collect["turns"] > 0
        assert collect["weight_version"] == round_index - 1
        assert evaluate["heldout"]["tasks"] == 3
        assert manifest(undisturbed, round_index)["weight_version"] == round_index
    assert json.loads((undisturbed / "rounds/0000/collect.json").read_text())["teacher_turn_share"] == 1.0
    assert (undisturbed / "report.html").stat().st_size > 10_000
    assert len((undisturbed / "metrics.jsonl").read_text().splitlines()) == 6
    assert list((undisturbed / "tensorboard").iterdir())
    drawn = ["drawing random weights" in log.read_text() for log in sorted(undisturbed.glob("logs/train-*/rank-0.log"))]
    assert drawn == [True, False], "only where no checkpoint is loaded"


def test_an_evaluation_is_diagnosed(undisturbed):
    for round_index in (0, 1):
        values, episodes = drift(undisturbed, round_index), evaluated(undisturbed, round_index)
        counted = [values[place]["turns"] for place in ("on_path", "off_path")]
        assert sum(counted) == sum(len(episode.turns) for episode in episodes), "every state has a label"
        wrong = sum(not turn.agrees for episode in episodes for turn in episode.turns)
        assert values["on_path"]["errors"] + values["off_path"]["errors"] == wrong
        assert [sum(row[column] for row in values["by_depth"]) for column in (1, 3)] == counted
        assert 0 <= values["new_states"] <= values["visited_states"] <= sum(counted)
        takeovers = list(DataStore.open(undisturbed / "takeovers.zarr").episodes(round_index))
        taken, strayed = values["expert_from_student_states"], sum(bool(states_off_path(e)) for e in episodes)
        assert taken["tried"] == taken["replayed_exactly"] == len(takeovers) == strayed
        assert taken["solved"] == sum(episode.solved for episode in takeovers)
    references = DataStore.open(undisturbed / "references.zarr")
    assert references.rounds() == references.sealed() == [0]
    assert values["expert_alone"]["tried"] == len(references.committed(0)) == 3


def evaluated(run, round_index):
    return list(DataStore.open(run / "evaluations.zarr").episodes(round_index))


def test_student_turns_have_weight_version_and_logprobs(undisturbed):
    store = DataStore.open(undisturbed / "data.zarr")
    turns = [turn for episode in store.episodes(1) for turn in episode.turns]
    students = [turn for turn in turns if turn.acted_by == "student"]
    assert students
    for turn in students:
        assert turn.action.weight_version == 0
        assert len(turn.action.logprobs) == len(turn.action.tokens)
        assert (turn.action.logprobs <= 0).all()
        assert turn.label is not None


def test_commands_read_the_run(undisturbed):
    def out(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_dagger.cli.main", *argv],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "evaluate" in out("status", str(undisturbed))
    assert "locate" in out("show", str(undisturbed), "--round", "0")
    assert out("show", str(undisturbed), "--round", "1", "--list").count("turns") == 4
    assert "report.html" in out("report", str(undisturbed))


def test_replay_repeats_recorded_episodes(undisturbed, cache, monkeypatch, capsys):
    monkeypatch.setenv("MEGATRON_DAGGER_CACHE", str(cache))
    assert main(["replay", str(undisturbed), "--round", "1", "--all"]) == 0
    assert capsys.readouterr().out.count("same observations, same ending") == 4
    recorded = next(iter(DataStore.open(undisturbed / "data.zarr").episodes(1)))
    first, second, *rest = recorded.turns
    changed = replace(recorded, solved=not recorded.solved, turns=(first, replace(second, observation="else"), *rest))
    assert replay(undisturbed, [changed]) == 1
    printed = capsys.readouterr().out
    assert f"1 of {len(recorded.turns)} observations differ" in printed
    assert "\n-else\n+" in printed
    shorter = replace(recorded, turns=recorded.turns[:-1])
    assert replay(undisturbed, [shorter]) == 1
    assert "the record ends after" in capsys.readouterr().out


def test_a_run_killed_in_several_stages_ends_like_an_undisturbed_run(undisturbed, cache, tmp_path):
    """SIGKILL hits the driver during the collection, then a training rank, then the driver in round 1."""
    run = tmp_path / "killed"

    def start():
        return subprocess.Popen(
            command(run), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def wait_for(condition, process):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert process.poll() is None, process.stderr.read().decode()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def finish(process):
        process.wait(timeout=60)
        process.stderr.close()

    driver = start()
    wait_for(lambda: list(run.glob("data.zarr/rounds/0000/**/zarr.json")), driver)
    os.kill(driver.pid, signal.SIGSTOP)  # keeps it in the collection while the second driver tries to start
    second = subprocess.run(command(run), env=environment(cache), capture_output=True, timeout=60, check=False)
    assert second.returncode == 2
    assert f"is in use by process {driver.pid}".encode() in second.stderr
    os.kill(driver.pid, signal.SIGKILL)
    finish(driver)

    driver = start()
    wait_for(lambda: list(run.glob("rounds/0000/train/metrics.jsonl")), driver)
    os.kill(writers(run / "logs" / "train-0000" / "rank-1.log")[-1], signal.SIGKILL)
    assert driver.wait(timeout=60) == 1, "a failed rank ends the run with an error"
    assert b"SIGKILL" in driver.stderr.read()
    finish(driver)

    driver = start()
    wait_for(lambda: list(run.glob("rounds/0000/evaluate.json")), driver)
    time.sleep(0.5)
    os.kill(driver.pid, signal.SIGKILL)
    finish(driver)

    done = subprocess.run(command(run), env=environment(cache), capture_output=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert not subprocess.run(["pgrep", "-f", str(run)], capture_output=True, check=False).stdout
    assert not [pid for log in run.glob("logs/**/*.log") for pid in writers(log)]

    assert_same(run, undisturbed)
    assert_same_evaluations(run, undisturbed)


def test_a_teacher_endpoint_gives_the_same_round_as_the_expert(undisturbed, cache, tmp_path):
    run = tmp_path / "endpoint"
    stage = [sys.executable, "-m", "megatron_dagger.cli.main", "rollout", str(run), "--round", "0"]
    with chat_server(expert) as server:
        settings = [*SETTINGS, "teacher.urls=[http://localhost:9/v1]", "teacher.model=expert"]
        create_run(override(short_repair(), settings), run)
        done = subprocess.run(
            stage,
            env=environment(cache) | {TEACHER_URLS: server.url},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        turns = sum(len(episode.turns) for episode in DataStore.open(run / "data.zarr").episodes(0))
        assert len(server.requests) == turns > 20, "one request for each state"
    stores = [DataStore.open(folder / "data.zarr") for folder in (undisturbed, run)]
    assert stores[0].manifest(0).digest == stores[1].manifest(0).digest
