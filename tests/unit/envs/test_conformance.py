"""Our environments run the suite that a user runs on theirs, and it notices what a run would stumble over."""

from dataclasses import replace

import pytest

from megatron_dagger.config import EnvironmentConfig, RoadConfig, RunConfig
from megatron_dagger.envs.base import Env, Observation
from megatron_dagger.envs.environment import Environment
from megatron_dagger.envs.testing import check_environment
from megatron_dagger.recipes.long_repair import long_repair
from megatron_dagger.recipes.own_environment import guess_a_number
from megatron_dagger.recipes.positive_control import positive_control
from megatron_dagger.recipes.short_repair import short_repair

STDLIB = {"source": "stdlib", "train_packages": ("textwrap", "graphlib"), "heldout_packages": ("colorsys",)}


def repairs(recipe, **settings):
    config = recipe()
    return replace(
        config, repo_repair=replace(config.repo_repair, train_tasks=2, heldout_tasks=2, **STDLIB, **settings)
    )


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(positive_control(), id="road"),
        pytest.param(guess_a_number(), id="own"),
        pytest.param(repairs(short_repair), id="repair", marks=pytest.mark.slow),
        pytest.param(repairs(long_repair, bugs=2), id="long", marks=pytest.mark.slow),
    ],
)
def test_our_environments_conform(config, tmp_path):
    check_environment(config, tmp_path)


class Wrong(Env):
    """An environment with one fault."""

    count = 0

    def __init__(self, task_id, fault):
        self.task_id, self.fault = task_id, fault
        type(self).count += 1

    def reset(self):
        return ("system", None if self.fault == "message" else "task")

    def step(self, command):
        if self.fault == "raises" and not command.strip():
            raise IndexError("no command")
        return Observation(text=f"{self.count}" if self.fault == "differs" else "ok")

    def judge(self):
        return None if self.fault == "judgement" else True

    def report(self):
        return {"set": {1}} if self.fault == "report" else {}

    def close(self):
        if self.fault == "closing":
            raise RuntimeError("not open")


def load_wrong(context):
    fault = context.config.tasks.options["fault"]
    return Environment(
        train_tasks=("a", "a") if fault == "twice" else ("a",),
        heldout_tasks=("a",) if fault == "both" else (1,) if fault == "id" else () if fault == "none" else ("b",),
        make_env=lambda task_id: Wrong("other" if fault == "other" else task_id, fault),
        read=lambda response: None if fault == "read" else response.text,
    )


@pytest.mark.parametrize(
    "fault",
    [
        *("message", "raises", "differs", "judgement", "report", "closing"),
        *("twice", "both", "id", "none", "other", "read"),
    ],
)
def test_each_fault_is_noticed(fault, tmp_path):
    tasks = EnvironmentConfig(kind=f"{__name__}:load_wrong", options={"fault": fault})
    with pytest.raises((AssertionError, IndexError, TypeError, RuntimeError)):
        check_environment(RunConfig(tasks=tasks, road=RoadConfig()), tmp_path)


def test_without_a_fault_it_conforms(tmp_path):
    check_environment(
        RunConfig(tasks=EnvironmentConfig(kind=f"{__name__}:load_wrong", options={"fault": ""})), tmp_path
    )
