"""The chain of jobs, independent of any launcher."""

import subprocess
import sys
from pathlib import Path

from megatron_dagger.config import RunConfig, load_yaml, override
from megatron_dagger.launch.stages import round_stages
from megatron_dagger.recipes import find_recipe
from tools.support.checkpoints import write_index

ROOT = Path(__file__).resolve().parents[3]


def stages(*settings, directory=Path("/runs/it"), work_dir=Path("/work dir"), program="megatron-dagger", workers=1):
    config = override(find_recipe("short_repair")(), list(settings))
    return round_stages(config, directory, work_dir, program, workers=workers)


def test_each_round_is_rollout_train_evaluate():
    names = [stage.name for stage in stages("dagger.rounds=1")]
    assert names == [f"round{index}-{stage}" for index in (0, 1) for stage in ("rollout", "train", "evaluate")]


def test_evaluation_of_the_last_round_only():
    names = [stage.name for stage in stages("dagger.rounds=1", "dagger.evaluate_rounds=last")]
    assert names == ["round0-rollout", "round0-train", "round1-rollout", "round1-train", "round1-evaluate"]


def test_only_training_spans_nodes():
    nodes = {stage.name: stage.nodes for stage in stages("training.parallel.nodes=2", "dagger.rounds=0")}
    assert nodes == {"round0-rollout": 1, "round0-train": 2, "round0-evaluate": 1}


def test_several_workers_collect_before_the_round_is_sealed():
    chain = stages("dagger.rounds=1", "dagger.evaluate_rounds=last", workers=3)
    assert [(stage.name, stage.nodes) for stage in chain] == [
        ("round0-collect", 3), ("round0-rollout", 1), ("round0-train", 1),
        ("round1-collect", 3), ("round1-rollout", 1), ("round1-train", 1), ("round1-evaluate", 1),
    ]  # fmt: skip
    assert chain[3].script.endswith("rollout /runs/it --round 1 --worker $SLURM_PROCID/$SLURM_NTASKS\n")
    assert " create " in chain[0].script
    assert not any(" create " in stage.script for stage in chain[1:])


def test_the_first_script_creates_the_run(tmp_path):
    """Run the script up to ``create`` by bash, with the real command line."""
    directory, work_dir = tmp_path / "a run", tmp_path / "work dir"
    write_index(work_dir / "here" / "it", find_recipe("short_repair")().model)
    program = f"{sys.executable} -m megatron_dagger.cli.main"
    first = stages("init_checkpoint=here/it", directory=directory, work_dir=work_dir, program=program)[0]
    script, marker, rest = first.script.rpartition(f"exec {program}")
    assert marker
    assert rest == f" rollout '{directory}' --round 0\n"
    done = subprocess.run(["bash", "-c", script], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = load_yaml(RunConfig, directory / "config.yaml")
    checkpoint = f"init_checkpoint={work_dir}/here/it"
    assert written == override(find_recipe("short_repair")(), [checkpoint])
