"""An episode printed for a terminal."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from megatron_dagger.observability.show import show
from megatron_dagger.types import ActedBy
from tests.support.trajectories import make_action, make_trajectory, make_turn


def shown(trajectory: object, **options: object) -> str:
    stream = io.StringIO()
    show(trajectory, stream=stream, **options)
    return stream.getvalue()


def test_an_episode_shows_who_acted_the_labels_and_the_outcome() -> None:
    turns = (
        make_turn([5], [5], acted_by=ActedBy.TEACHER, observation="the task"),
        make_turn([6], [7], observation="some output"),
        make_turn([8], [8]),
        make_turn([9], None),
    )
    text = shown(make_trajectory("toolz__1", turns=turns, solved=False))
    lines = [line.strip() for line in text.splitlines()]
    assert "teacher > say 5" in lines
    assert "student > say 6" in lines
    assert lines[lines.index("student > say 6") + 1] == "teacher would > say 7"
    assert text.count("teacher would") == 1  # only where it differs
    assert lines[lines.index("student > say 9") + 1] == "(no label)"
    assert "not solved  (submitted, 4 turns; the student agreed with the teacher in 1 of 2 of its turns)" in text
    assert lines.index("some output") < lines.index("student > say 6")
    assert "\x1b" not in text  # no colours without a terminal


def test_untrusted_text_cannot_control_the_terminal_or_rich() -> None:
    hostile = "\x1b]0;title\x07\x1b[2J[red]markup[/red]\r\x9b31m\u202eevil"
    turn = replace(make_turn([1], [2], observation=hostile), action=make_action(1, text=hostile))
    text = shown(make_trajectory(hostile, turns=(turn,), details={"k": hostile}))
    assert not set(text) & set("\x1b\x07\r\x9b\u202e")
    assert "[red]markup[/red]" in text


def test_long_observations_are_cut_in_the_middle() -> None:
    turn = make_turn([1], observation="\n".join(f"line {n}" for n in range(100)))
    text = shown(make_trajectory(turns=(turn,)), max_lines=9)
    assert "line 5\n... lines left out: 91 ...\nline 97\n" in text
    assert "line 50" in shown(make_trajectory(turns=(turn,)), max_lines=0)


def test_colours_appear_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    show(make_trajectory(), stream=stream)
    assert "\x1b[" in stream.getvalue()
