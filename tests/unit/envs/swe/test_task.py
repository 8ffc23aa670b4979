"""Evaluation tasks stay out of training."""

import dataclasses

import pytest

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.envs.swe.swegym import HELD_OUT, swegym_task
from megatron_dagger.envs.swe.swesmith import swesmith_task
from megatron_dagger.envs.swe.task import EvaluationSet, TrainingTasks, held_out
from tests.unit.envs.swe.rows import BENCH, GYM, PATCH, SMITH


def test_no_task_of_the_evaluation_set_can_be_trained_on():
    evaluated = swebench_task(BENCH)
    other = dataclasses.replace(evaluated, instance_id="org__pkg-99", base_commit="12345678", patch=PATCH + "+y = 1\n")
    never = EvaluationSet([evaluated])
    same_id = dataclasses.replace(other, instance_id="org__PKG-12")
    same_commit = dataclasses.replace(other, base_commit=evaluated.base_commit[:12], repo="fork/Pkg")
    same_patch = dataclasses.replace(other, patch=PATCH.replace("@@ -1 +1 @@", "@@ -7,1 +7,1 @@"))
    smith = swesmith_task({**SMITH, "patch": PATCH + "-z\n"})  # of the commit that is evaluated
    for task, why in (
        (same_id, "in the evaluation set"),
        (same_commit, "at commit c0ffee00"),
        (same_patch, "its gold patch"),
        (smith, "at commit c0ffee00"),
    ):
        with pytest.raises(ConfigError, match=why):
            TrainingTasks([other, task], never=never)
        kept, refused = TrainingTasks.allowed([other, task], never=never)
        assert list(kept) == [other]
        assert list(refused) == [task.instance_id]
    assert list(TrainingTasks([other], never=never)) == [other]
    with pytest.raises(ConfigError, match="has tasks of Org/pkg"):
        TrainingTasks([other], never=EvaluationSet([evaluated], whole_repositories=True))


def test_the_published_count_of_swegym_is_held_out():
    template = swegym_task({**GYM, "patch": ""})
    tasks = [
        dataclasses.replace(template, instance_id=f"getmoto__moto-{n}", base_commit=f"{n:08x}") for n in range(2438)
    ]
    heldout = held_out(tasks, HELD_OUT)
    assert held_out(reversed(tasks), HELD_OUT) == heldout, "the order of the rows does not matter"
    assert held_out(tasks, HELD_OUT, seed=1) != heldout
    without_one = [task for task in tasks if task != heldout[0]]
    assert held_out(without_one, HELD_OUT)[:-1] == heldout[1:], (
        "refusing one row does not change the choice of the others"
    )
    train, refused = TrainingTasks.allowed(tasks, never=EvaluationSet(heldout))
    assert (len(heldout), len(train), set(refused)) == (100, 2338, {task.instance_id for task in heldout})


@pytest.mark.parametrize(
    ("image", "registry", "expected"),
    [
        ("org/image:tag", "", "org/image:tag"),
        ("org/image:tag", "mirror.lan:5000", "mirror.lan:5000/org/image:tag"),
        ("docker.io/org/image", "mirror.lan:5000/hub/", "mirror.lan:5000/hub/org/image"),
        ("ghcr.io/org/image@sha256:0a", "mirror", "mirror/org/image@sha256:0a"),
        ("localhost:5000/image", "mirror", "mirror/image"),
        ("image:tag", "mirror", "mirror/image:tag"),
    ],
)
def test_an_image_can_be_taken_from_a_mirror(image, registry, expected):
    task = dataclasses.replace(swebench_task(BENCH), image=image)
    assert task.with_image_of(registry).image == expected
