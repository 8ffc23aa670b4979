"""A study's runs: what they start from, what is read from them, and what is left to do after a kill."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("zarr")

from megatron_dagger.config import ConfigError
from megatron_dagger.driver.run_dir import create_run, load_run_config
from megatron_dagger.recipes import find_recipe
from megatron_dagger.store.aggregated import DataStore
from megatron_dagger.store.lock import exclusive
from tests.support.run_directory import make_run
from tests.support.study_outcomes import make_outcome
from tests.support.trajectories import make_trajectory, make_turn
from tools.study.outcome import read_outcome, save
from tools.study.plan import RECIPE, Cell, Plan
from tools.study.runs import Study, run_program
from tools.study.shared import Shared, start_from

PLAN = Plan(arms=("sft", "dagger"), amounts={1: (100,)}, seeds=2, heldout=5, steps=10)
CELL = next(PLAN.all_cells())


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    """A finished run of two rounds, whose evaluations were diagnosed."""
    run = make_run(tmp_path_factory.mktemp("study") / "runs" / "donor", rounds=2, tasks=4, heldout=3, turns=6)
    references = DataStore.create_or_open(run / "references.zarr")
    references.append([make_trajectory(f"task-{n}", turns=(make_turn([1], [1]),) * (n + 2)) for n in range(3)])
    references.seal(0)
    (run / "student").mkdir()
    (run / "student" / "config.json").write_text("{}")
    for index in (0, 1):
        path = run / f"rounds/{index:04d}/train/manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": 7 * (index + 1)}))
    return run


def test_a_runs_numbers_are_read_from_its_files(donor):
    outcome = read_outcome(donor, CELL, 12.5)
    evaluated = [e for e in DataStore.open(donor / "evaluations.zarr").episodes(1) if e.task_id in outcome.solved]
    assert outcome.solved == {episode.task_id: episode.solved for episode in evaluated}
    assert len(outcome.solved) == 3, "the training tasks are evaluated too, and do not count"
    turns = [turn for e in evaluated for turn in e.turns]
    assert sum(outcome.errors(on_path=on)[0] for on in (True, False)) == len(turns)
    assert sum(outcome.errors(on_path=on)[1] for on in (True, False)) == sum(not turn.agrees for turn in turns)
    data = DataStore.open(donor / "data.zarr")
    collected = [turn for index in (0, 1) for e in data.episodes(index) for turn in e.turns]
    assert outcome.labelled_tokens == sum(len(turn.label.tokens) for turn in collected)
    assert outcome.executed_tokens == sum(len(t.action.tokens) for t in collected if t.acted_by == "teacher")
    assert outcome.labels == (7, 14)
    assert outcome.labels_due == (0, 0), "this run has no limit"
    assert outcome.steps == (60, 60)
    assert outcome.teacher_turns == 3


def test_a_run_starts_from_what_it_shares(donor, tmp_path):
    run, settings = donor.parent / tmp_path.name, PLAN.run_settings(replace(CELL, arm="dagger"))
    start_from(donor, Shared(trained=1, collected=2, references=True), run, RECIPE, settings)
    assert load_run_config(run) == PLAN.config(replace(CELL, arm="dagger"))
    for name, rounds in (("data", [0, 1]), ("references", [0])):
        ours, theirs = (DataStore.open(folder / f"{name}.zarr") for folder in (run, donor))
        assert ours.sealed() == rounds
        assert [ours.manifest(index) for index in rounds] == [theirs.manifest(index) for index in rounds]
        ours.verify()
    assert [path.parent.parent.name for path in run.glob("rounds/*/train/manifest.json")] == ["0000"]
    assert not list(run.glob("rounds/*/*.json")), "the stages' reports are the run's own"
    assert not (run / "evaluations.zarr").exists()
    assert (run / "student" / "config.json").exists()
    with pytest.raises(FileExistsError):
        start_from(donor, Shared(collected=1), run, RECIPE, settings)
    assert not list(donor.parent.glob(".tmp-*"))


def test_a_study_goes_on_where_it_was(tmp_path):
    study = Study(tmp_path, PLAN)
    all_cells = list(PLAN.all_cells())
    assert study.pending() == all_cells
    assert study.outcomes() == []
    before = study.seconds_to_go([])
    outcome = make_outcome(all_cells[0], 2, tasks=5, seconds=2 * PLAN.assumed_seconds(all_cells[0]))
    save(tmp_path / "outcomes" / f"{all_cells[0].name}.json", outcome)
    assert study.outcomes() == [outcome]
    assert study.pending() == all_cells[1:]
    rest = before - PLAN.assumed_seconds(all_cells[0])
    assert study.seconds_to_go([outcome]) == pytest.approx(2 * rest), "the finished run took twice as long as assumed"


def test_several_processes_share_a_study(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(Study, "_run", lambda study, cell: taken.append(cell) or make_outcome(cell, 2, tasks=5))
    (tmp_path / "locks").mkdir()
    with exclusive(tmp_path / "locks" / "k1-s0"):
        assert [outcome.cell for outcome in Study(tmp_path, PLAN).run()] == taken
    assert {cell.seed for cell in taken} == {1}, "another process does the runs of seed 0"
    list(Study(tmp_path, PLAN).run())
    assert {cell.seed for cell in taken} == {0, 1}


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    settings = PLAN.run_settings(CELL)
    create_run(find_recipe(RECIPE)(), tmp_path / "runs" / CELL.name, settings, recipe=RECIPE)
    Study(tmp_path, PLAN).check()
    Study(tmp_path, replace(PLAN, seeds=3)).check()
    with pytest.raises(ConfigError, match=r"other settings \(.*training.max_steps=10, training.max_steps=20\)"):
        Study(tmp_path, replace(PLAN, steps=20)).check()
    with pytest.raises(ConfigError, match="unknown setting"):
        Study(tmp_path, replace(PLAN, settings=("dagger.no_such=1",))).check()


def test_a_program_that_fails_is_an_error_with_its_output(tmp_path):
    log = tmp_path / "logs" / "run.log"
    with pytest.raises(RuntimeError, match=r"ended with exit code 2; see .*run.log:\n(.|\n)*is not a run directory"):
        run_program(["run", str(tmp_path / "nowhere")], log)
    assert "is not a run directory" in log.read_text()


def test_cells_have_names_of_their_own():
    all_cells = list(PLAN.all_cells())
    assert len({cell.name for cell in all_cells}) == len(all_cells)
    assert Cell(arm="sft", horizon=8, amount=300, seed=1, greedy=True).name == "sft-k8-300-s1-greedy"
