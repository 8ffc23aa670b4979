"""Plan a recipe or a run on GPUs: memory, rates and hours, before it is queued.

A recipe that cannot fit is refused with the reason and the nearest settings that do:

  megatron-dagger plan qwen3_8b_swegym_8h100
  megatron-dagger plan qwen3_8b_swegym_8h100 training.recompute=full --gpu h200 --assume mfu=0.35 --json
  sbatch --time=$(megatron-dagger plan qwen3_8b_swegym_8h100 --job-hours):00:00 slurm/multi_node.sbatch ...
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from megatron_dagger.cli.arguments import recipe_or_run
from megatron_dagger.config import ConfigError, ModelConfig, RunConfig, build, to_dict
from megatron_dagger.config.base import parse_value
from megatron_dagger.dagger.beta import betas
from megatron_dagger.planning import GPUS, Assumptions, Change, Gpu, RunPlan, nearest_that_fits, plan_run
from megatron_dagger.planning.gpus import DEFAULT_GPU
from megatron_dagger.planning.job_time import MARGIN, run_hours
from megatron_dagger.planning.memory import GIB
from megatron_dagger.planning.parameters import active_parameters, total_parameters

if TYPE_CHECKING:
    from rich.table import Table

_PARTS = ("weights", "fp8_weights", "gradients", "optimizer", "activations", "working", "reserve", "total", "capacity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME", help="the recipe to plan; its name alone means the same")
    parser.add_argument(
        "subject", nargs="*", metavar="RECIPE|RUN|NAME=VALUE", help="a recipe or a run directory; settings"
    )
    parser.add_argument(
        "--gpu",
        type=str.lower,
        choices=sorted(GPUS),
        default=DEFAULT_GPU,
        help=f"the kind of GPU (default: {DEFAULT_GPU})",
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"change an assumption: {', '.join(f.name for f in fields(Assumptions))}",
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    output.add_argument(
        "--job-hours",
        action="store_true",
        help=f"print only the hours that one job for the whole run should ask for, {MARGIN:g} times those planned",
    )


def main(arguments: argparse.Namespace) -> int:
    """Return 0 if the recipe fits, 1 (after the reason and the nearest settings that do) if not."""
    name, config = recipe_or_run(arguments.subject, arguments.recipe)
    gpu, assumed = GPUS[arguments.gpu], _assumptions(arguments.assume)
    if config.training.precision == "fp32":
        sys.stderr.write(f"note: {name} trains in fp32, which is for the CPU; these are the numbers of an {gpu.name}\n")
    plan = plan_run(config, betas(config.dagger), gpu, assumed)
    change = None if plan.fits else nearest_that_fits(config, gpu, assumed)
    if arguments.job_hours:
        print(run_hours(plan))
    elif arguments.json:
        print(json.dumps(report(config, gpu, assumed, plan, change), indent=1))
    else:
        _print(config, gpu, assumed, plan)
    if plan.fits:
        return 0
    sys.stderr.write(f"error: {name} does not fit {config.training.parallel.world_size} x {gpu.name}\n")
    sys.stderr.writelines(f"  {problem}\n" for problem in plan.problems)
    sys.stderr.write(f"  {_advice(change)}\n")
    return 1


def report(
    config: RunConfig, gpu: Gpu, assumed: Assumptions, plan: RunPlan, change: Change | None = None
) -> dict[str, Any]:
    """Return all of a plan as plain values; sizes in GiB."""
    serving = plan.memory.serving
    return {
        "fits": plan.fits,
        "problems": list(plan.problems),
        "nearest": list(change.settings) if change else None,
        "gpu": asdict(gpu),
        "parameters": total_parameters(config.model),
        "active_parameters": active_parameters(config.model),
        "training_gib": [
            {"stage": m.stage, "parameters": m.parameters, **{part: getattr(m, part) / GIB for part in _PARTS}}
            for m in plan.memory.training
        ],
        "serving_gib": {name: getattr(serving, name) / GIB for name in ("weights", "working", "kv_cache", "total")},
        "kv_tokens": serving.kv_tokens,
        "full_sequences": serving.full_sequences,
        "fit_together": plan.memory.fit_together,
        "episode": to_dict(plan.episode),
        "rollout": to_dict(plan.rollout),
        "teacher": to_dict(plan.teacher),
        "rounds": [to_dict(r) | {"total_s": r.total_s} for r in plan.rounds],
        "assumptions": to_dict(assumed),
    }


def model_size(model: ModelConfig) -> str:
    """Return a model's number of parameters in words, with the active ones if it has experts."""

    def short(count: float) -> str:
        return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"

    size = f"{short(total_parameters(model))} parameters"
    return size if model.num_moe_experts is None else f"{size}, {short(active_parameters(model))} of them active,"


def _assumptions(assignments: list[str]) -> Assumptions:
    values = {}
    for assignment in assignments:
        name, sign, _ = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--assume: expected NAME=VALUE, got {assignment!r}")
        values[name.strip()] = parse_value(assignment)
    return build(Assumptions, values, "assume")


def _advice(change: Change | None) -> str:
    if change is None:
        return "no change of layout, recomputation or length makes it fit: take more GPUs or a smaller model"
    needs = change.memory.fullest.total / GIB
    return f"the nearest settings that fit ({needs:.1f} GiB in training): {' '.join(change.settings)}"


def _print(config: RunConfig, gpu: Gpu, assumed: Assumptions, plan: RunPlan) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else 110
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    training, parallel = config.training, config.training.parallel
    layout = f"TP{parallel.tensor_model_parallel_size} x PP{parallel.pipeline_model_parallel_size}"
    layout += f" x DP{parallel.data_parallel_size}" + (", sequence parallel" if parallel.sequence_parallel else "")
    if config.model.num_moe_experts is not None:
        layout += f", experts EP{parallel.expert_model_parallel_size} x ETP{parallel.expert_tensor_parallel_size}"
        layout += f" x DP{parallel.expert_data_parallel_size}"
    console.print(
        f"{config.name}: {model_size(config.model)} on {parallel.world_size} x {gpu.name}\n"
        f"training: {training.precision}, {layout}, recompute {training.recompute}, rows of "
        f"{training.sequence_length} tokens, {training.micro_batches} per GPU and step\n"
        f"serving: {config.rollout.engine.dtype}, one engine on {config.rollout.engine.tensor_parallel_size} GPUs"
    )
    for table in (_training_table(plan), _serving_table(plan), _rates_table(plan), _rounds_table(plan)):
        console.print(table)
    if not plan.memory.fit_together:
        console.print(
            "Trainer and engine do not fit the same GPUs at once: run the stages one after another (rollout, train, "
            "evaluate), not in one process with `megatron-dagger run`; slurm/single_node_with_teacher.sbatch (one "
            "node) and slurm/multi_node.sbatch do so."
        )
    console.print("assumed, not measured: " + ", ".join(f"{k}={v:g}" for k, v in to_dict(assumed).items()))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    table.show_header = any(columns)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _training_table(plan: RunPlan) -> Table:
    """Show the first, the fullest and the last pipeline stage: the stages between them are alike."""
    stages = plan.memory.training
    shown = sorted({0, plan.memory.fullest.stage, len(stages) - 1})
    table = _table("training, GiB per GPU", "", *(f"stage {index}" for index in shown))
    for part in _PARTS:
        table.add_row(part.replace("_", " "), *(f"{getattr(stages[index], part) / GIB:.1f}" for index in shown))
    return table


def _serving_table(plan: RunPlan) -> Table:
    serving = plan.memory.serving
    table = _table("serving, GiB per GPU", "", "")
    for part in ("weights", "working", "kv_cache", "total", "capacity"):
        table.add_row(part.replace("_", " "), f"{getattr(serving, part) / GIB:.1f}")
    table.add_row("tokens in the KV cache", f"{serving.kv_tokens:,}")
    table.add_row(f"sequences of {serving.max_model_len} tokens at once", f"{serving.full_sequences}")
    return table


def _rates_table(plan: RunPlan) -> Table:
    rollout, teacher = plan.rollout, plan.teacher
    table = _table("rates while a round collects", "", "")
    table.add_row("concurrent episodes, of which in the engine", f"{rollout.episodes}, {rollout.decoding:.1f}")
    table.add_row("turns/s", f"{rollout.turns_per_s:.2f}")
    table.add_row("student tokens/s if it acted in every turn", f"{rollout.tokens_per_s:.0f}")
    table.add_row("teacher: labels/s", f"{teacher.requests_per_s:.2f}")
    table.add_row("teacher: tokens/s generated, newly read", f"{teacher.written_per_s:.0f}, {teacher.read_per_s:.0f}")
    table.add_row("teacher: mean prompt, tokens", f"{teacher.context:.0f}")
    return table


def _rounds_table(plan: RunPlan) -> Table:
    columns = ("round", "student's turns", "labels", "steps", "train tokens", "tokens/s")
    table = _table("rounds", *columns, "rollout h", "train h", "evaluate h", "total h")
    for r in plan.rounds:
        hours = [f"{seconds / 3600:.2f}" for seconds in (r.rollout_s, r.train_s, r.evaluate_s, r.total_s)]
        counts = [f"{r.student_share:.0%}", f"{r.turns:,.0f}", f"{r.optimizer_steps}", f"{r.train_tokens / 1e6:,.1f}M"]
        table.add_row(str(r.round_index), *counts, f"{r.train_tokens_per_s:,.0f}", *hours)
    table.add_row("all", *[""] * 8, f"{plan.total_s / 3600:.2f}")
    return table
