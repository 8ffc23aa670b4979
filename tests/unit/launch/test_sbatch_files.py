"""The sbatch files' examples: what they name is there and fits the nodes that the file asks for."""

import re
import shlex
from pathlib import Path

import pytest

from megatron_dagger.config import override
from megatron_dagger.training.ranks.launch import check_gpus
from recipes import find_recipe

FILES = sorted((Path(__file__).resolve().parents[3] / "slurm").glob("*.sbatch"))


def asked(text, option):
    """The number that is asked for by the first such line; of a heterogeneous job, for the trainer's nodes."""
    return int(re.findall(rf"{option}=(\d+)", text)[0])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_rank_of_the_example_has_a_gpu(file):
    text = file.read_text()
    words = next(shlex.split(line)[2:] for line in text.splitlines() if line.startswith("#   sbatch"))
    recipe = find_recipe(words[words.index("--recipe") + 1])()
    nodes, gpus = (asked(" ".join(words) + text, option) for option in ("--nodes", "--gpus-per-node"))
    settings = [word for word in words if "=" in word and not word.startswith("--")]
    config = override(recipe, [*settings, f"training.parallel.nodes={nodes}"])
    assert f"slurm/{file.name}" in words
    assert config.training.parallel.world_size % nodes == 0
    check_gpus(config.training.parallel, gpus)
