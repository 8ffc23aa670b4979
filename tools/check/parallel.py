"""Check that a training step does not depend on the parallel layout or on packing, for Qwen3 and Qwen3-MoE in fp32.

Every layout trains the same steps from a checkpoint, weights and optimizer, that a single process or another layout
has saved. Its losses and gradient norms must equal those of a single process. In the last step only one micro-batch has
labels. Loss and gradients of packed rows, and of one row with all samples, must equal those of one sample in each row;
these in turn must equal those of Transformers' model with the same weights.

    .venv/bin/python -m tools.check.parallel                        18 layouts of up to 4 ranks, several minutes
    .venv/bin/python -m tools.check.parallel --layouts tp2,pp2      some of them

It prints the largest differences and their limits. The last line is ``RESULT {json}``; the exit code is 1 if a limit is
exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dagger.config import ParallelConfig, TrainingConfig
from megatron_dagger.training.data import packing
from megatron_dagger.training.data.episode_file import save_episodes
from megatron_dagger.training.job import TrainJob
from megatron_dagger.training.metrics import read_steps
from megatron_dagger.training.ranks.launch import launch
from megatron_dagger.weights.checkpoints import open_checkpoint
from megatron_dagger.weights.verify.digest import canonical_digests
from tools.check.parallel_references import (
    DEADLINE_S,
    MODELS,
    ROW_TOKENS,
    compare_with_transformers,
    reference_name,
)
from tools.support import labelled_episodes

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parallel layout to compare with a single process; ``moe`` selects the model with experts."""

    world_size: int
    settings: dict[str, Any]
    moe: bool = False
    after: str | None = None  # the layout whose checkpoint, optimizer included, it continues


TP, SP, PP, VPP, EP = (
    "tensor_model_parallel_size",
    "sequence_parallel",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
LAYOUTS = {
    "tp2": Layout(world_size=2, settings={TP: 2}),
    "pp2": Layout(world_size=2, settings={PP: 2}),
    "dp2": Layout(world_size=2, settings={}),
    "tp2_sp": Layout(world_size=2, settings={TP: 2, SP: True}),
    "pp2_vpp2": Layout(world_size=2, settings={PP: 2, VPP: 2}),
    "tp2_sp_after_pp2_vpp2": Layout(world_size=2, settings={TP: 2, SP: True}, after="pp2_vpp2"),
    "moe_ep2": Layout(world_size=2, settings={EP: 2}, moe=True),
    "moe_pp2_vpp2": Layout(world_size=2, settings={PP: 2, VPP: 2}, moe=True),
    "moe_tp2_sp": Layout(world_size=2, settings={TP: 2, SP: True}, moe=True),
    "moe_tp2_sp_ep2": Layout(world_size=2, settings={TP: 2, SP: True, EP: 2}, moe=True),
    "moe_pp2_after_ep2": Layout(world_size=2, settings={PP: 2}, moe=True, after="moe_ep2"),
    "tp2_pp2": Layout(world_size=4, settings={TP: 2, PP: 2}),
    "tp2_sp_pp2_vpp2": Layout(world_size=4, settings={TP: 2, SP: True, PP: 2, VPP: 2}),
    "tp2_dp2": Layout(world_size=4, settings={TP: 2}),
    "pp2_dp2": Layout(world_size=4, settings={PP: 2}),
    "moe_ep2_dp2": Layout(world_size=4, settings={EP: 2}, moe=True),
    "moe_ep2_pp2": Layout(world_size=4, settings={EP: 2, PP: 2}, moe=True),
    "moe_tp2_sp_ep4": Layout(world_size=4, settings={TP: 2, SP: True, EP: 4}, moe=True),
}
ROWS_PER_STEP = 4
LIMIT = 1e-5
GRADIENT_LIMIT = 1e-4  # relative to the largest gradient, or to the norm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps to compare (default %(default)s)")
    parser.add_argument(
        "--layouts", default=",".join(LAYOUTS), help="comma-separated names (default: all: %(default)s)"
    )
    parser.add_argument("--untied", action="store_true", help="a model whose output layer is not its embedding")
    arguments = parser.parse_args()
    names = arguments.layouts.split(",")
    unknown = [name for name in names if name not in LAYOUTS]
    if unknown:
        parser.error(f"--layouts {unknown[0]}: no such layout; choose from {', '.join(LAYOUTS)}")
    missing = [layout.after for name in names if (layout := LAYOUTS[name]).after and layout.after not in names]
    if missing:
        parser.error(f"--layouts: add {missing[0]}, whose checkpoint one of the layouts continues")
    with tempfile.TemporaryDirectory(prefix="check-parallel-") as folder:
        result = _check(Path(folder), names, arguments.steps, tie=not arguments.untied)
    print(f"{'compared':<28}{'largest difference':>20}{'limit':>10}")
    failed = False
    for name, value in result.items():
        if name != "steps":
            limit = GRADIENT_LIMIT if "_grad" in name else LIMIT
            failed |= not value <= limit
            print(f"{name:<28}{value:>20.2e}{limit:>10.0e}{'' if value <= limit else '  TOO LARGE'}")
    print("RESULT " + json.dumps(result))
    return int(failed)


def _check(folder: Path, names: list[str], steps: int, *, tie: bool) -> dict[str, Any]:
    episodes = labelled_episodes.make(20, seed=1, vocab_size=250, longest=250, branches=0.3)
    save_episodes(folder / "episodes.npz", episodes)
    jobs = _Jobs(folder, steps, len(packing.pack(episodes, ROW_TOKENS).rows), tie=tie)
    kinds = sorted({LAYOUTS[name].moe for name in names})
    for moe in kinds:
        single = Layout(world_size=1, settings={}, moe=moe)
        jobs.write(reference_name("start", moe), single, first_steps=2)
        jobs.write(reference_name("single", moe), single, start=reference_name("start", moe))
        jobs.write(reference_name("next", moe), single, start=reference_name("single", moe))
    command = [sys.executable, "-m", "tools.check.parallel_references", str(folder)]
    variables = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=DEADLINE_S)
    result: dict[str, Any] = {"steps": steps}
    for world_size in sorted({LAYOUTS[name].world_size for name in names}):
        group = [name for name in LAYOUTS if name in names and LAYOUTS[name].world_size == world_size]
        for name in group:
            jobs.write(name, LAYOUTS[name], start=LAYOUTS[name].after or reference_name("start", LAYOUTS[name].moe))
        launch(
            ["megatron_dagger.training", str(folder / "episodes.npz"), *(str(folder / f"{n}.json") for n in group)],
            ParallelConfig(world_size=world_size),
            folder / f"logs{world_size}",
            DEADLINE_S,
            env={"PYTHONPATH": str(ROOT)},
        )
    for name in names:
        reference = reference_name("next" if LAYOUTS[name].after else "single", LAYOUTS[name].moe)
        (loss, norm), (single_loss, single_norm) = _curves(folder / name), _curves(folder / reference)
        assert len(loss) == len(single_loss) == steps, f"{name}: {len(loss)} of {steps} steps"
        _check_digests(folder / name)
        result[name] = float(np.abs(loss - single_loss).max())
        result[name + "_grad_norm"] = float(np.abs(norm / single_norm - 1).max())
    for moe in kinds:
        measured = json.loads((folder / f"{reference_name('packed', moe)}.json").read_text())
        measured |= compare_with_transformers(folder, reference_name("single", moe))
        result |= {reference_name(name, moe): value for name, value in measured.items()}
    return result


def _check_digests(output_dir: Path) -> None:
    """Assert that the saved tensors have the digests of the tensors in the ranks' memory."""
    tensors = open_checkpoint(output_dir / "checkpoint")
    saved = canonical_digests(tensors.canonical_tensors(), tensors.model)
    assert saved == json.loads((output_dir / "manifest.json").read_text())["digests"], output_dir.name


@dataclass(frozen=True)
class _Jobs:
    folder: Path
    steps: int
    rows: int  # of the packed data
    tie: bool

    def write(self, name: str, layout: Layout, *, start: str | None = None, first_steps: int = 0) -> None:
        """Write a training job whose last step has one row: the other micro-batches, and some ranks, have no label."""
        rows = ROWS_PER_STEP * ((first_steps or self.steps) - 1) + 1
        training = TrainingConfig(
            parallel=ParallelConfig(world_size=layout.world_size, **layout.settings),
            sequence_length=ROW_TOKENS,
            packing="shared_prefix",
            global_batch_tokens=ROWS_PER_STEP * ROW_TOKENS,
            epochs=rows / self.rows,
            deadline_s=DEADLINE_S,
        )
        job = TrainJob(
            round_index=1 if start else 0,  # a later round also loads the optimizer's state
            seed=1,
            model=replace(MODELS[layout.moe], tie_embeddings=self.tie),
            training=training,
            output_dir=str(self.folder / name),
            init_checkpoint=str(self.folder / start / "checkpoint") if start else None,
        )
        job.save(self.folder / f"{name}.json")


def _curves(output_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss and the gradient norm of each step."""
    lines = read_steps(output_dir / "metrics.jsonl")
    return np.array([line["loss"] for line in lines]), np.array([line["grad_norm"] for line in lines])


if __name__ == "__main__":
    sys.exit(main())
