"""The method in whole runs: DAgger leaves SFT far behind where it must, at equal labels and steps.

``python -m tools.check.positive_control --break all`` shows that ``problems`` is not empty if a part is broken.
"""

import json

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.store.aggregated import DataStore
from tools.check.positive_control import ARMS, FIRST_SEED, LEAST_DAGGER, LEAST_GAP, problems, run_arm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Return the folder of the finished runs ``sft`` and ``dagger``, and their outcomes."""
    folder = tmp_path_factory.mktemp("control")
    return folder, {arm: run_arm(folder / arm, arm, FIRST_SEED) for arm in ARMS}


def test_dagger_leaves_sft_far_behind_at_equal_labels_and_steps(arms):
    _, outcomes = arms
    sft, dagger = outcomes["sft"], outcomes["dagger"]
    assert not problems(sft, dagger)
    assert sft.labels == dagger.labels == dagger.labels_due
    assert sft.steps == dagger.steps
    assert dagger.success >= LEAST_DAGGER
    assert dagger.success - sft.success >= LEAST_GAP


def test_the_arms_share_their_first_round_and_differ_in_who_acts_later(arms):
    folder, _ = arms
    digests = [DataStore.open(folder / arm / "data.zarr").manifest(0).digest for arm in ARMS]
    assert digests[0] == digests[1]

    def teacher_share(arm, round_index):
        return json.loads((folder / arm / f"rounds/{round_index:04d}/collect.json").read_text())["teacher_turn_share"]

    shares = {arm: [teacher_share(arm, round_index) for round_index in range(3)] for arm in ARMS}
    assert shares == {"sft": [1, 1, 1], "dagger": [1, 0, 0]}


def test_commands_read_a_run_without_a_sandbox(arms, capsys):
    folder, _ = arms
    run = str(folder / "dagger")
    assert main(["replay", run, "--round", "2", "--all"]) == 0
    replayed = capsys.readouterr().out.splitlines()
    assert len(replayed) == 260
    assert all(line.endswith("same observations, same ending") for line in replayed)
    assert main(["status", run]) == 0
    assert main(["show", run, "--round", "1", "--failed"]) == 0
    assert "back" in capsys.readouterr().out
    assert main(["report", run]) == 0
