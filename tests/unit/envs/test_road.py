"""The road: its rules, its teacher, and that nothing but the task's name and the commands decides."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from megatron_dagger.config import RoadConfig, RunConfig
from megatron_dagger.envs.environment import EnvironmentContext
from megatron_dagger.envs.road import COMMANDS, LETTERS, WAY_BACK, Road, load_environment, next_command
from megatron_dagger.rollout.episode import FORMAT_ERROR
from megatron_dagger.types import Message, State

CONTEXT = EnvironmentContext(
    config=RunConfig(seed=5, road=RoadConfig(stops=12, train_tasks=3, heldout_tasks=2)),
    run_dir=Path(), cache_dir=Path(), track=None, stack=None,
)  # fmt: skip


def said(text, role="user"):
    return Message(role=role, content=text)


def walk(road, choose):
    """Walk until the end, with the commands that ``choose`` returns for what is seen; return all that is seen."""
    seen, done = [road.reset()[1]], False
    while not done:
        observation = road.step(choose(seen[-1], len(seen) - 1))
        seen.append(observation.text)
        done = observation.done
    return seen


def right(shown, _turn):
    return next_command((said(shown),))


def wrong(shown):
    letter = right(shown, 0)[-1]
    return f"go {LETTERS[LETTERS.find(letter) - 1]}"


def test_the_teacher_arrives_and_is_never_lost():
    for number in range(50):
        road = Road(f"t-{number}", stops=12)
        seen = walk(road, right)
        assert len(seen) == 13
        assert seen[-1] == "there"
        assert not any("lost" in shown for shown in seen)
        assert road.judge()


def test_after_a_slip_the_way_back_leads_on():
    road = Road("t", stops=4)
    seen = walk(road, lambda shown, turn: wrong(shown) if turn == 1 else right(shown, turn))
    assert [shown.split()[0] for shown in seen] == ["road"] * 2 + ["lost"] * WAY_BACK + ["road"] * 3 + ["there"]
    assert road.judge()


@pytest.mark.parametrize("turn", [2, 3])
def test_a_wrong_command_when_lost_ends_the_walk(turn):
    road = Road("t", stops=4)
    seen = walk(road, lambda shown, now: wrong(shown) if now in (1, turn) else right(shown, now))
    assert [shown.split()[0] for shown in seen] == ["road"] * 2 + ["lost"] * (turn - 1) + ["nowhere"]
    assert not road.judge()


def test_what_is_seen_follows_from_the_name_and_the_commands():
    def slips(shown, turn):
        return wrong(shown) if turn in (1, 7) else right(shown, turn)

    assert walk(Road("a", 12), slips) == walk(Road("a", 12), slips) != walk(Road("b", 12), slips)


def test_signs_are_answered_by_their_letter_and_numbers_by_one_of_all_letters():
    assert next_command((said("road C"),)) == "go C"
    assert next_command((said("lost"),)) == "back"
    letters = {next_command((said(f"road {number}"),)) for number in range(100, 1000)}
    assert letters == {f"go {letter}" for letter in LETTERS}


def test_the_teacher_labels_a_state_after_a_reply_without_a_command():
    messages = [said("Follow the road.", "system"), said("lost"), said("lost", "assistant"), said(FORMAT_ERROR)]
    teacher = load_environment(CONTEXT).expert(lambda text: np.array([len(text)], np.int32))
    action = asyncio.run(teacher.act(State(messages=tuple(messages), tokens=np.zeros(1, np.int32), seed=0)))
    assert (action.text, action.tokens.tolist()) == ("back", [4])


def test_the_environment_names_its_tasks_and_needs_nothing_else():
    environment = load_environment(CONTEXT)
    assert environment.train_tasks == ("train-5-0", "train-5-1", "train-5-2")
    assert environment.heldout_tasks == ("heldout-0", "heldout-1")
    texts = environment.tokenizer_texts()
    assert {text.split()[0] for text in texts} >= {*COMMANDS, *COMMANDS.values()}
    with environment.make_env("heldout-0") as env:
        assert env.report() == {}
        assert walk(env, right)[-1] == "there"
