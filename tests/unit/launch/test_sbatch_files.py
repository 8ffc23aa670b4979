"""The examples in the sbatch files name existing recipes and files, and fit the nodes that the file requests."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_dagger.config import override
from megatron_dagger.recipes import find_recipe
from megatron_dagger.training.ranks.launch import check_gpus

FILES = sorted((Path(__file__).resolve().parents[3] / "slurm").glob("*.sbatch"))


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
