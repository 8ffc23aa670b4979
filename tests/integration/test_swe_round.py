"""Rounds of SWE tasks by the command line: containers, a teacher behind an endpoint, labels, official grading."""

import json
from dataclasses import replace

import pytest

from megatron_dagger.config import ConfigError, RunConfig, SweConfig, TeacherConfig
from megatron_dagger.driver.environments import one_tool_call
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.policies.openai.cache import MalformedResponse, Reply
from tools.check.swe_round import make_tasks, run_rounds

ENGINES = ("swebench", "vllm", "megatron.core", "transformers")


@pytest.mark.slow
def test_rounds_of_mutated_packages_from_containers_to_the_official_grading(daemon, cache, tmp_path, monkeypatch):
    for engine in ENGINES:
        pytest.importorskip(engine)
    monkeypatch.setenv("MEGATRON_DAGGER_CACHE", str(cache))
    tasks = make_tasks("stdlib", 8, 3)  # those of the tiny run
    tasks = replace(tasks, train=tasks.train[:4], heldout=tasks.heldout[:2])
    found = run_rounds(tmp_path, tasks, daemon.url, ["training.max_steps=6"], repeats=1)
    assert found["valid"] == 4
    by_teacher, mixed = found["rounds"]
    assert (by_teacher["episodes"], by_teacher["solved"], by_teacher["teacher_turn_share"]) == (2, 2, 1.0)
    assert by_teacher["last_loss"] < by_teacher["first_loss"]
    assert mixed["labelled_turns"] == mixed["turns"] > 0
    assert 0 < mixed["teacher_turn_share"] < 1
    assert found["weight_version"] == 1
    assert found["judge_agrees"] == mixed["episodes"] == 2
    assert found["collected_resolved"] == mixed["solved"]
    assert found["heldout"]["tasks"] == 2
    assert (found["heldout_trained_on"], found["leaked_containers"]) == (0, 0)


def test_a_call_that_the_endpoint_took_apart_is_read_as_one_that_it_left_whole():
    call = ToolCall(name="bash", arguments={"command": "grep -n 'é' a.py"})
    apart = Reply(text="Let me look.", tool_calls=(("bash", json.dumps(call.arguments)),))
    assert one_tool_call(apart) == one_tool_call(Reply(text=f"Let me look.\n{call.text()}"))
    for calls in ((("bash", "{no json"),), (("bash", '{"cmd": "ls"}'),), 2 * (("submit", "{}"),), ()):
        with pytest.raises(MalformedResponse):
            one_tool_call(Reply(text="", tool_calls=calls))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": TeacherConfig()}, r"swe\.train needs teacher\.urls"),
        ({"init_checkpoint": None}, r"swe\.train needs init_checkpoint"),
    ],
)
def test_what_these_tasks_need_is_said(changed, message):
    needed = {
        "swe": SweConfig(train="rows.jsonl", heldout_of_train=10),
        "teacher": TeacherConfig(urls=("http://localhost:1/v1",), model="m"),
        "init_checkpoint": "checkpoints/m",
    }
    RunConfig(**needed)
    with pytest.raises(ConfigError, match=message):
        RunConfig(**{**needed, **changed})


def test_tasks_to_evaluate_on_must_be_named():
    with pytest.raises(ConfigError, match=r"swe\.heldout is missing"):
        SweConfig(train="rows.jsonl")
