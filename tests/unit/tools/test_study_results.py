"""The numbers and the page of a study, from few and from many finished runs."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest

pytest.importorskip("zarr")

from tests.support.study_outcomes import make_outcome
from tools.study.outcome import load, save, unmatched
from tools.study.page import page
from tools.study.plan import Cell, Plan
from tools.study.summary import Results, numbers, visible_difference

PLAN = Plan(amounts={0: (100,), 1: (100, 300), 4: (100, 300)}, seeds=3, heldout=20, steps=50)
SOLVED = {("sft", 0): 15, ("sft", 1): 16, ("sft", 4): 8, ("dagger", 4): 14}  # of 20; else as SFT


def outcome_of(cell):
    solved = SOLVED.get((cell.arm, cell.horizon), SOLVED["sft", cell.horizon])
    return make_outcome(cell, solved + (cell.seed == 1))


@pytest.fixture
def outcomes():
    return [outcome_of(cell) for cell in PLAN.all_cells()]


def test_the_numbers_are_those_of_the_runs(outcomes):
    result = json.loads(json.dumps(numbers(Results(outcomes))))
    assert result["seeds"] == 3
    assert result["heldout_tasks"] == 20
    assert result["horizons_median_turns"] == {"0": 2.0, "1": 10.0, "4": 34.0}
    assert result["success"]["sft"]["4"] == {"100": pytest.approx(25 / 60), "300": pytest.approx(25 / 60)}
    assert result["success"]["dagger"]["4"]["100"] == pytest.approx(43 / 60)
    assert result["success_greedy"].keys() == {"sft", "dagger", "prefix"}
    assert result["longest_horizon"] == 4
    assert result["smaller_amount"] == 100
    assert result["difference_points"] == pytest.approx(30)
    assert result["ci_low"] <= 30 <= result["ci_high"]
    assert result["gap_slope"] == pytest.approx(15), "30 points at 4 bugs, none at 1: two doublings"
    assert result["on_path_error_sft"] == pytest.approx(10 / 700)
    assert result["new_states_share"] == pytest.approx(0.2)
    assert result["expert_from_student_states"] == pytest.approx(0.9)
    assert result["smallest_visible_difference_measured"] > 0


def test_a_study_without_enough_runs_has_no_intervals():
    assert numbers(Results([]))["difference_points"] is None
    first_seed = [outcome_of(cell) for cell in PLAN.all_cells() if cell.seed == 0 and not cell.greedy]
    result = numbers(Results(first_seed))
    assert result["success"]["dagger"][4][100] == 0.7
    assert result["difference_points"] is result["gap_slope"] is result["smallest_visible_difference_measured"] is None
    wilson = Results(first_seed).success("sft", 4, 100)
    assert wilson.low < wilson.mean == 0.4 < wilson.high


def test_the_difference_is_paired_by_task():
    cell = Cell(arm="sft", horizon=1, amount=100, seed=0)
    sft = make_outcome(cell, 2, tasks=4)
    dagger = make_outcome(replace(cell, arm="dagger"), 3, tasks=5)
    assert Results([sft, dagger]).differences("dagger", 1, 100) == {0: [0.0, 0.0, 100.0, 0.0]}


def test_more_seeds_and_tasks_see_smaller_differences():
    assert visible_difference(5, 100, 8.0) < visible_difference(5, 20, 8.0) < visible_difference(2, 20, 8.0)


def test_arms_that_are_not_matched_are_named():
    cell = Cell(arm="sft", horizon=4, amount=100, seed=0)
    sft, dagger = make_outcome(cell, 1), make_outcome(replace(cell, arm="dagger"), 1)
    assert not unmatched([sft, dagger])
    (problem,) = unmatched([sft, replace(dagger, labels=(100, 190, 290))])
    assert problem == "dagger-k4-100-s0: trained on (100, 190, 290) labels, not (100, 200, 300)"
    (problem,) = unmatched([sft, replace(dagger, steps=(50, 50, 20))])
    assert problem.startswith("the steps differ: sft-k4-100-s0 (50, 50, 50), dagger")


def test_an_outcome_is_read_as_it_was_written(tmp_path):
    outcome = make_outcome(Cell(arm="prefix", horizon=0, amount=7, seed=2, greedy=True), 3)
    save(tmp_path / "outcome.json", outcome)
    assert load(tmp_path / "outcome.json") == outcome


@pytest.mark.parametrize("finished", [0, 1, 3, 200])
def test_the_page_shows_what_is_finished(outcomes, finished):
    chosen = outcomes[:finished]
    text = page(Results(chosen), ["A <study>."])
    tree = ElementTree.fromstring(text.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', ""))
    titles = [title.text for title in tree.iter("{http://www.w3.org/2000/svg}title")]
    rows = [[cell.text for cell in row] for row in tree.iter("tr")]
    groups = {replace(outcome.cell, seed=0) for outcome in chosen}
    assert len(rows) == 1 + len(groups)
    assert len({len(row) for row in rows}) == 1
    assert "A &lt;study&gt;." in text
    if finished == len(outcomes) or finished == 200:
        assert titles == [
            "Success by horizon, fewer labels", "Success by horizon, more labels",
            "Gap by horizon, fewer labels", "Gap by horizon, more labels",
            *(f"Errors {place} the teacher's path, {kind}" for kind in ("short kind", "1 bug", "4 bugs")
              for place in ("on", "off")),
        ]  # fmt: skip
        row = next(row for row in rows if row[:4] == ["4 bugs", "100", "DAgger", "sampled"])
        assert row[4:7] == ["3", "20", "71.7%"]
        assert row[8] == "+30.0"
        assert row[16:] == ["300", "150", "1,000", "3,000"]


def test_the_page_says_what_is_not_comparable(outcomes):
    assert "in the same number of steps." in page(Results(outcomes), [])
    outcomes[0] = replace(outcomes[0], labels=(1, 2, 3))
    assert "Not matched, so not comparable: sft-k0-100-s0" in page(Results(outcomes), [])
