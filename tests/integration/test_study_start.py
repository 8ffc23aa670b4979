"""A run that starts from another's results ends as one that is run from the beginning."""

import subprocess

import pytest

from tests.integration.tiny_run import (
    DEADLINE_S,
    SETTINGS,
    assert_same,
    assert_same_evaluations,
    command,
    environment,
)
from tools.study.shared import Shared, start_from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_that_continues_from_anothers_round_0_ends_the_same(undisturbed, cache, tmp_path):
    run = undisturbed.parent / tmp_path.name
    start_from(undisturbed, Shared(trained=1, collected=1, references=True), run, "short_repair", SETTINGS)
    done = subprocess.run(
        command(run), env=environment(cache), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(run, undisturbed)
    assert_same_evaluations(run, undisturbed)
    inodes = [(folder / "data.zarr/rounds/0000/zarr.json").stat().st_ino for folder in (run, undisturbed)]
    assert inodes[0] == inodes[1], "round 0 was not collected again"
    inodes = [(folder / "rounds/0001/train/manifest.json").stat().st_ino for folder in (run, undisturbed)]
    assert inodes[0] != inodes[1], "round 1 was trained anew"
