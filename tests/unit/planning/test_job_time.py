"""The hours that recipes state and jobs ask for: those of the plan."""

import re
from pathlib import Path

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.dagger.beta import betas
from megatron_dagger.launch.stages import DEFAULT_HOURS, round_stages
from megatron_dagger.planning.job_time import MARGIN, default_plan
from megatron_dagger.recipes import RECIPES, find_recipe

README = Path(__file__).resolve().parents[3] / "recipes" / "README.md"
PLANS = {name: default_plan(recipe(), betas(recipe().dagger)) for name, recipe in RECIPES.items()}
ON_GPUS = [name for name, plan in PLANS.items() if plan is not None]


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_table_of_recipes_has_the_planned_hours(name):
    row = next(line for line in README.read_text().splitlines() if line.startswith(f"| [`{name}`]"))
    assert row.split(" | ")[4] == f"{PLANS[name].total_s / 3600:.1f}"


@pytest.mark.parametrize("name", ON_GPUS)
def test_no_job_of_a_recipe_asks_for_less_than_its_stage_needs(name):
    config, plan = find_recipe(name)(), PLANS[name]
    hours = {stage.name: stage.hours for stage in round_stages(config, Path("/run"), Path("/work"), "program")}
    for planned in plan.rounds:
        for stage in ("rollout", "train", "evaluate"):
            needed = MARGIN * getattr(planned, f"{stage}_s") / 3600
            limit = hours.get(f"round{planned.round_index}-{stage}")
            assert limit is None or needed <= limit < needed + 1 or limit == 1
        assert planned.train_s * MARGIN < config.training.deadline_s


def test_a_run_on_the_cpu_is_not_planned():
    config = find_recipe("quickstart")()
    assert PLANS["quickstart"] is None
    stages = round_stages(config, Path("/run"), Path("/work"), "program")
    assert {stage.hours for stage in stages} == {DEFAULT_HOURS}


def test_the_hours_of_a_whole_run_are_printed_for_sbatch(capsys):
    assert main(["plan", "qwen3_8b_swegym_8h100", "--job-hours"]) == 0
    hours = int(capsys.readouterr().out)
    assert 0 <= hours - MARGIN * PLANS["qwen3_8b_swegym_8h100"].total_s / 3600 < 1
    assert main(["recipes", "qwen3_8b_swegym_8h100"]) == 0
    printed = capsys.readouterr().out
    assert f"sbatch --time={hours}:00:00 slurm/single_node_with_teacher.sbatch RUN" in printed


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_that_a_recipe_prints_leaves_its_training_the_gpus(name, capsys):
    """A recipe whose trainer does not fit beside its engine is not started in one process."""
    assert main(["recipes", name]) == 0
    printed = capsys.readouterr().out
    together = PLANS[name] is None or PLANS[name].memory.fit_together
    assert (f"megatron-dagger run RUN --recipe {name}" in printed) == together
    nodes = find_recipe(name)().training.parallel.nodes
    assert together or re.search(r"slurm/(\w+)\.sbatch", printed)[1] == (
        "multi_node" if nodes > 1 else "single_node_with_teacher"
    )
