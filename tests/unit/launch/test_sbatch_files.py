"""The sbatch files: their examples name existing recipes and fit the nodes they request; the environment they use."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_dagger.config import override
from megatron_dagger.recipes import find_recipe
from megatron_dagger.training.ranks.launch import check_gpus

SLURM = Path(__file__).resolve().parents[3] / "slurm"
FILES = sorted(SLURM.glob("*.sbatch"))


def requested(text, option):
    """Return the first number for ``option``; in a heterogeneous job it is that of the trainer's nodes."""
    return int(re.findall(rf"{option}=(\d+)", text)[0])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_rank_of_the_example_has_a_gpu(file):
    text = file.read_text()
    argv = next(shlex.split(line)[2:] for line in text.splitlines() if line.startswith("#   sbatch"))
    recipe = find_recipe(argv[argv.index("--recipe") + 1])()
    nodes, gpus = (requested(" ".join(argv) + text, option) for option in ("--nodes", "--gpus-per-node"))
    settings = [word for word in argv if "=" in word and not word.startswith("--")]
    config = override(recipe, [*settings, f"training.parallel.nodes={nodes}"])
    assert f"slurm/{file.name}" in argv
    assert config.training.parallel.world_size % nodes == 0
    check_gpus(config.training.parallel, gpus)


@pytest.mark.parametrize(
    "folders, venv, chosen",
    [
        ((".venv",), None, ".venv"),
        ((".venv", ".venv-cuda"), None, ".venv-cuda"),
        ((".venv", ".venv-cuda"), "/opt/own", "/opt/own"),
        ((), None, ".venv"),
    ],
)
def test_jobs_use_the_environment_for_gpus_where_there_is_one(folders, venv, chosen, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir()
    script = f". {SLURM / 'site.sh'}; echo $VENV; echo ${{PATH%%:*}}"
    env = {"PATH": os.environ["PATH"]} | ({"VENV": venv} if venv else {})
    done = subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    folder = str(tmp_path / chosen)
    assert done.stdout.split() == [folder, f"{folder}/bin"]
