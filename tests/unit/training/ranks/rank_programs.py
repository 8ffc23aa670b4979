"""Small programs that run as ranks, and checks of their processes."""

from pathlib import Path

import pytest

from megatron_dagger.config import ParallelConfig
from megatron_dagger.training.ranks.launch import launch

REPOSITORY = Path(__file__).resolve().parents[4]
TWO = ParallelConfig(world_size=2)
forked = pytest.mark.parametrize("start_method", ["forked"], indirect=True)  # for tests of the fork server


def run(tmp_path, source, *, deadline_s=30.0, parallel=TWO):
    (tmp_path / "rank_program.py").write_text(source)
    path = f"{tmp_path}:{REPOSITORY}"
    launch(["rank_program", str(tmp_path)], parallel, tmp_path / "logs", deadline_s, env={"PYTHONPATH": path})


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
