"""Exports for other tools: their content, and that a failure leaves no partial file."""

import json

import numpy as np
import pytest

from megatron_dagger.observability.export import FORMATS, export, system_message
from megatron_dagger.types import ActedBy, StopReason
from tests.support.trajectories import make_trajectory, make_turn, random_trajectory

TURNS = (
    make_turn([5], [5], acted_by=ActedBy.TEACHER, observation="fix the bug"),
    make_turn([6], [7, 8], observation="output \ud800 é"),
    make_turn([9], None, observation="more"),
)
EPISODES = [
    make_trajectory("toolz__1", turns=TURNS, details={"patch": "--- a/x.py"}),
    make_trajectory("a/b c", turns=TURNS[:1], solved=False, stop_reason=StopReason.TURN_LIMIT, round_index=2),
]


def exported(path, form, episodes=EPISODES):
    assert export(iter(episodes), path, form, system=lambda episode: "be an agent") == len(episodes)
    return [json.loads(line) for line in path.read_text().splitlines()] if form in ("openai", "labels") else path


def test_openai_messages(tmp_path):
    first, second = exported(tmp_path / "deep" / "it.jsonl", "openai")
    assert first["messages"] == [
        {"role": "system", "content": "be an agent"},
        {"role": "user", "content": "fix the bug"},
        {"role": "assistant", "content": "say 5"},
        {"role": "user", "content": "output ? é"},
        {"role": "assistant", "content": "say 6"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "say 9"},
    ]
    assert (first["instance_id"], first["solved"], first["stop_reason"]) == ("toolz__1", True, "submitted")
    assert (second["solved"], second["round"]) == (False, 2)


def test_every_labelled_state_is_a_sample_that_ends_with_the_teachers_answer(tmp_path):
    samples = exported(tmp_path / "it.jsonl", "labels")
    assert [(s["instance_id"], s["turn"], s["executor"]) for s in samples] == [
        ("toolz__1", 0, "teacher"),
        ("toolz__1", 1, "student"),
        ("a/b c", 0, "teacher"),
    ]
    assert [m["content"] for m in samples[1]["messages"]] == [
        "be an agent", "fix the bug", "say 5", "output ? é", "say 7 8",
    ]  # fmt: skip


def test_trajectories_for_mini_swe_agents_inspector(tmp_path):
    folder = exported(tmp_path / "trajs", "traj")
    assert sorted(p.name for p in folder.iterdir()) == ["a_b_c-r2-0.traj.json", "toolz__1-r0-0.traj.json"]
    value = json.loads((folder / "toolz__1-r0-0.traj.json").read_text())
    assert value["trajectory_format"] == "mini-swe-agent-1.1"
    assert (value["info"]["exit_status"], value["info"]["submission"]) == ("Submitted", "--- a/x.py")
    assert value["info"]["model_stats"]["api_calls"] == 3
    assert value["messages"][4]["extra"] == {
        "actions": [{"command": "say 6"}], "executor": "student", "label": "say 7 8",
    }  # fmt: skip


def test_predictions_for_swe_benchs_harness(tmp_path):
    export(iter(EPISODES), tmp_path / "it.jsonl", "predictions", system=lambda episode: "")
    lines = [json.loads(line) for line in (tmp_path / "it.jsonl").read_text().splitlines()]
    assert lines == [
        {"instance_id": "toolz__1", "model_name_or_path": "megatron-dagger-round0", "model_patch": "--- a/x.py"},
        {"instance_id": "a/b c", "model_name_or_path": "megatron-dagger-round2", "model_patch": ""},
    ]


def test_parquet_has_tokens_and_log_probs(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    episodes = [random_trajectory(1, f"task-{i}") for i in range(3)]
    table = pq.read_table(exported(tmp_path / "it.parquet", "parquet", episodes)).to_pylist()
    turns = [(e, t) for e in episodes for t in e.turns]
    for row, (episode, turn) in zip(table, turns, strict=True):
        assert (row["task_id"], row["executor"], row["label"]) == (episode.task_id, turn.acted_by, turn.label.text)
        assert np.array_equal(row["action_tokens"], turn.action.tokens)
        logprobs = None if turn.action.logprobs is None else turn.action.logprobs.tolist()
        assert row["action_logprobs"] == logprobs


@pytest.mark.parametrize("form", FORMATS)
def test_a_failed_export_leaves_nothing_and_no_file_is_replaced(tmp_path, form):
    def broken():
        yield EPISODES[0]
        raise RuntimeError("the store is gone")

    with pytest.raises(RuntimeError, match="the store is gone"):
        export(broken(), tmp_path / "it", form, system=lambda episode: "")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "it").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        export(iter(EPISODES), tmp_path / "it", form, system=lambda episode: "")
    assert (tmp_path / "it").read_text() == "mine"


def test_the_system_message_is_read_from_the_first_prompt():
    opening = "<|im_start|>system\nbe\nan agent<|im_end|>\n<|im_start|>user\nfix it<|im_end|>\n<|im_start|>assistant\n"
    assert system_message(opening) == "be\nan agent"
    assert system_message("<|im_start|>user\nfix it<|im_end|>") == ""
