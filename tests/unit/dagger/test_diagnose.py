"""The diagnosis of evaluations: labels that change nothing, and teachers that take over in a student's state.

The task is a road of three steps; ``stray`` leaves it by one, ``back`` leads back by one. The teacher knows the way.
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from megatron_dagger.config import DaggerConfig, LimitsConfig, RolloutConfig, RunConfig, TeacherConfig
from megatron_dagger.dagger.context import train_manifest
from megatron_dagger.dagger.diagnose import choose_take_over, diagnoses
from megatron_dagger.dagger.loop import evaluate
from megatron_dagger.dagger.worker import Worker
from megatron_dagger.envs.base import Observation
from megatron_dagger.policies.base import NoAction, PolicyError
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.store.atomic import write_json
from megatron_dagger.types import ActedBy, Action, StopReason
from tests.support.trajectories import make_trajectory, make_turn
from tests.unit.dagger.one_step_env import TASKS, Student
from tools.support.scripted_policies import ReplayPolicy

HELDOUT = TASKS[:4]
STRAYING = ["step", "stray", "stray", "back", "submit"]  # off the path in turns 2 to 4; fails


@dataclass
class Road:
    """``breaks``: going back breaks the environment."""

    task_id: str
    breaks: bool = False
    at: int = 0
    astray: int = 0

    def reset(self):
        return "be an agent", self._place()

    def step(self, command):
        if command == "submit":
            return Observation(text="", done=True)
        if command == "back" and self.breaks:
            raise EnvironmentBroken("over 512 MiB", StopReason.OUT_OF_MEMORY)
        self.at += command == "step" and not self.astray
        self.astray = max(0, self.astray + (command == "stray") - (command == "back"))
        return Observation(text=self._place())

    def judge(self):
        return self.at == 3 and not self.astray

    def report(self):
        return {}

    def close(self):
        pass

    def _place(self):
        return f"{self.astray} astray" if self.astray else f"at {self.at}"


@dataclass
class Teacher:
    """Answers with ``error`` where the student is ``silent_at``."""

    encode: object
    error: Exception = field(default_factory=lambda: PolicyError("a request failed"))
    silent_at: str = ""
    name = "teacher"

    async def act(self, state):
        place = state.messages[-1].content
        if place == self.silent_at:
            raise self.error
        text = "back" if "astray" in place else "submit" if place == "at 3" else "step"
        return Action(text=text, tokens=self.encode(text))


@pytest.fixture
def road(context):
    """A function that returns the context of a run on the road, whose student repeats the given actions."""
    context, _, _ = context
    for index in (0, 1):
        manifest = {"canary": {"tokens": [1, 2], "logprobs": [-1.0]}, "checkpoint": "checkpoint", "digests": {}}
        write_json(train_manifest(context.run_dir, index), manifest)
    encode = context.renderer.action

    def opened(actions=STRAYING, *, breaks=False, diagnose=None, max_turns=40, **teacher):
        config = RunConfig(
            dagger=DaggerConfig(rounds=1, evaluation_tasks=len(HELDOUT), evaluation_train_tasks=1, diagnose=diagnose),
            rollout=RolloutConfig(limits=LimitsConfig(max_turns=max_turns)),
        )
        student = Student(ReplayPolicy(actions, encode))
        return replace(
            context,
            config=config,
            train_tasks=TASKS[4:],
            make_env=lambda task: Road(task, breaks),
            teacher=Teacher(encode, **teacher),
            student=lambda: student,
        )

    return opened


def run(context, *, round_index=0, worker=None):
    asyncio.run(evaluate(context, round_index, worker))
    report = context.round_dir(round_index) / "evaluate.json"
    return json.loads(report.read_text()) if report.exists() else None


def test_an_evaluation_reports_how_the_student_drifts(road):
    context = road()
    values = run(context)
    assert (values["heldout"]["tasks"], values["heldout"]["solved"]) == (4, 0)
    drift = values["drift"]
    assert drift["on_path"] == {"turns": 8, "errors": 4, "share": 0.5}
    assert drift["off_path"] == {"turns": 12, "errors": 8, "share": 8 / 12}
    assert drift["by_depth"] == [[0, 8, 4, 8, 4], [4, 0, 0, 4, 4]]
    assert (drift["visited_states"], drift["new_states"], drift["new_states_share"]) == (20, 12, 0.6)
    assert (drift["expert_alone"]["tried"], drift["expert_alone"]["success"]) == (4, 1.0)
    taken = drift["expert_from_student_states"]
    assert (taken["tried"], taken["solved"], taken["replayed_exactly"]) == (4, 4, 4)
    assert context.takeovers.sealed() == context.references.sealed() == [0]
    for episode in context.takeovers.episodes(0):
        first = [turn.acted_by for turn in episode.turns].index(ActedBy.TEACHER)
        assert first in (2, 3, 4), "the state is off the teacher's path"
        assert [turn.action.text for turn in episode.turns[:first]] == STRAYING[:first]


def test_labels_change_no_episode(road):
    contexts = [road(diagnose=False), road()]
    values = [run(context, round_index=index) for index, context in enumerate(contexts)]
    assert values[0]["drift"] is None
    assert values[0]["heldout"] == values[1]["heldout"]
    without, labelled = (list(contexts[0].evaluations.episodes(index)) for index in (0, 1))
    for plain, episode in zip(without, labelled, strict=True):
        assert [turn.action.text for turn in plain.turns] == [turn.action.text for turn in episode.turns]
        assert {turn.acted_by for turn in episode.turns} == {ActedBy.STUDENT}
        assert [turn.label is None for turn in plain.turns] == [turn.label is not None for turn in episode.turns]
    assert contexts[0].takeovers.rounds() == [1]


def test_the_teacher_plays_alone_once_a_run(road):
    context = road()
    opened = Counter()

    def make_env(task):
        opened[task] += 1
        return Road(task)

    context = replace(context, make_env=make_env)
    first, second = (run(context, round_index=index)["drift"] for index in (0, 1))
    assert first["expert_alone"] == second["expert_alone"]
    assert {opened[task] for task in HELDOUT} == {2 + 1 + 2}, "each is evaluated and taken over in each round"


@pytest.mark.parametrize("resident", [False, True])
def test_workers_share_the_diagnosis(road, resident):
    context = road()
    for index in (1, 0):
        values = run(context, worker=Worker(index=index, count=2, resident=resident))
    if not resident:
        assert values is None
        values = run(context)
    for store in (context.references, context.takeovers):
        assert store.committed(0) == {(task, 0) for task in HELDOUT}
        assert store.sealed() == [0]
    taken = values["drift"]["expert_from_student_states"]
    assert (taken["tried"], taken["solved"]) == (4, 4)
    assert values["broken_episodes"] == 0


def test_a_killed_diagnosis_resumes(road):
    context = road()
    run(context, worker=Worker(index=0, count=2))  # a part of every store, and no report
    [before] = [episode for episode in context.takeovers.episodes(0) if episode.task_id == HELDOUT[0]]
    assert run(context)["drift"]["expert_from_student_states"]["tried"] == 4
    after = context.takeovers.read(0, (HELDOUT[0], 0))
    assert after.duration_s == before.duration_s, "it was not run again"


def test_a_take_over_that_breaks_stops_no_run(road):
    values = run(road(["step", "stray", "stray", "submit"], breaks=True))
    taken = values["drift"]["expert_from_student_states"]
    assert (taken["tried"], taken["solved"], taken["given_up"], taken["success"]) == (4, 0, 4, 0.0)
    assert (values["broken_episodes"], values["heldout"]["given_up"]) == (0, 0)


@pytest.mark.parametrize("error", [PolicyError("a request failed"), NoAction("too long")])
def test_a_state_without_a_label_breaks_nothing(road, error):
    values = run(road(silent_at="2 astray", error=error))
    assert (values["heldout"]["tasks"], values["heldout"]["given_up"]) == (4, 0)
    drift = values["drift"]
    assert (drift["on_path"]["turns"], drift["off_path"]["turns"]) == (8, 4), "nothing is known after the third turn"


def test_the_teachers_part_has_the_limits_of_an_episode(road):
    context = road(["stray"] * 5, max_turns=5)
    drift = run(context)["drift"]
    for episode in context.takeovers.episodes(0):
        first = [turn.acted_by for turn in episode.turns].index(ActedBy.TEACHER)  # needs as many steps back, then 3
        assert (len(episode.turns) - first, episode.solved) == (5, first <= 2)
    assert drift["expert_alone"]["success"] == 1.0


def test_a_student_on_the_path_is_not_taken_over(road):
    context = road(["step", "step", "step", "submit"])
    drift = run(context)["drift"]
    assert drift["off_path"] == {"turns": 0, "errors": 0, "share": None}
    assert drift["new_states_share"] == 0.0
    assert (drift["expert_from_student_states"]["tried"], drift["expert_from_student_states"]["success"]) == (0, None)
    assert context.takeovers.rounds() == []


def test_the_state_of_a_take_over_is_drawn_uniformly():
    turns = tuple(make_turn(*pair) for pair in [([1], [1]), ([2], [1]), ([1], [1]), ([2], [1]), ([1], [1])])
    chosen = [choose_take_over(RunConfig(), make_trajectory(f"t{n}", turns=turns)).turn for n in range(300)]
    assert set(chosen) == {2, 3, 4}
    assert min(Counter(chosen).values()) > 70
    again = [choose_take_over(RunConfig(), make_trajectory(f"t{n}", turns=turns)).turn for n in range(300)]
    assert again == chosen


def test_labels_are_given_where_they_are_free():
    paid = RunConfig(teacher=TeacherConfig(urls=("http://localhost:9/v1",), model="m"))
    assert diagnoses(RunConfig())
    assert not diagnoses(paid)
    for wanted in (True, False):
        for config in (RunConfig(), paid):
            assert diagnoses(replace(config, dagger=DaggerConfig(diagnose=wanted))) is wanted
