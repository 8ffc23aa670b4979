"""List the recipes, or describe one: complete settings, named by model, task and hardware."""

from __future__ import annotations

import argparse
import inspect

from megatron_dagger.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe this recipe instead of listing all")


def main(arguments: argparse.Namespace) -> int:
    from megatron_dagger.recipes import RECIPES, find_recipe

    if arguments.name:
        recipe = find_recipe(arguments.name)
        print((inspect.getdoc(recipe) or "").replace("``", "`"), end="\n\n")
        config = recipe()
        for subject, fact in facts(config).items():
            print(f"{subject:12} {fact}")
        print(*_how_to_start(arguments.name, config), sep="\n")
        return 0
    for name, recipe in RECIPES.items():
        print(f"{name:32} {(recipe.__doc__ or '').strip().splitlines()[0]}")
    print("\n`megatron-dagger recipes NAME` describes one")
    return 0


def _how_to_start(name: str, config: RunConfig) -> list[str]:
    """Return the planned hours of a recipe for GPUs, and the command that starts a recipe."""
    from megatron_dagger.dagger.beta import betas
    from megatron_dagger.planning.job_time import default_plan, run_hours

    plan = default_plan(config, betas(config.dagger))
    lines = [] if plan is None else [f"{'hours':12} {plan.total_s / 3600:.1f} by `megatron-dagger plan`, not measured"]
    if plan is None or plan.memory.fit_together:
        return [
            *lines,
            f"\n`megatron-dagger run RUN --recipe {name}` starts it; --dry-run checks and prints the settings",
        ]
    file = "multi_node" if config.training.parallel.nodes > 1 else "single_node_with_teacher"
    job = f"sbatch --time={run_hours(plan)}:00:00 slurm/{file}.sbatch RUN --recipe {name}"
    return [*lines, f"\n`{job}`\nstarts it (a job that reaches its time limit is requeued and resumes)"]


def facts(config: RunConfig) -> dict[str, str]:
    """Return the main facts about a config, in words, by subject."""
    from megatron_dagger.cli.plan import model_size

    training, parallel, source = config.training, config.training.parallel, config.teacher.source
    device = "CPU processes" if training.precision == "fp32" else "GPU" if parallel.world_size == 1 else "GPUs"
    tasks = config.repo_repair
    environment = f"repair tasks, {tasks.train_tasks} to train on and {tasks.heldout_tasks} held out"
    if config.environment == "road":
        road = config.road
        environment = f"roads, {road.train_tasks} to train on and {road.heldout_tasks} held out"
    elif config.environment == "swe":
        environment = f"{config.swe.train_dataset} tasks in Docker containers (swe.train={config.swe.train})"
    elif config.environment != "repair":
        environment = " ".join(
            [config.environment, *(f"{name}={value}" for name, value in config.tasks.options.items())]
        )
    return {
        "model": f"{config.model.family}, {model_size(config.model)} from {config.init_checkpoint or 'random weights'}",
        "hardware": f"{parallel.world_size} {device}, {training.precision}: TP{parallel.tensor_model_parallel_size} "
        f"x PP{parallel.pipeline_model_parallel_size} x DP{parallel.data_parallel_size}",
        "environment": environment,
        "teacher": {"expert": "the environment's expert", "endpoint": config.teacher.model}.get(source, source),
        "rounds": f"{config.dagger.rounds} after round 0, of {config.dagger.tasks_per_round} tasks each",
    }
