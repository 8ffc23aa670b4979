"""The command line of a study: what it will run, what it refuses, and the RESULT of what is finished."""

import json

import pytest

pytest.importorskip("zarr")

from tests.support.study_outcomes import make_outcome
from tools.study.methods import main
from tools.study.outcome import save
from tools.study.plan import Plan

SIZE = ["--horizons", "1,4", "--amounts", "100", "--arms", "sft,dagger", "--seeds", "2", "--heldout", "20"]
PLAN = Plan(arms=("sft", "dagger"), amounts={1: (100,), 4: (100,)}, seeds=2, heldout=20, steps=200)


def test_the_size_and_the_power_are_said_first(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "full"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("300 runs, 300 of them to do: about ")
    assert "5 seeds of 100 held-out tasks show a difference of 18.0 points or more in 80% of studies" in printed
    assert main(["--out", str(tmp_path / "quick"), "--quick", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("4 runs, 4 of them to do: about ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--arms", "dagger"], "--arms dagger: add sft"),
        (["--arms", "sft,bc"], "--arms sft,bc: choose from sft,dagger,prefix"),
        (["--seeds", "1"], "two seeds or more"),
        (["--horizons", "1,12"], "write numbers of bugs from 0 to 9"),
        (["--horizons", "1;2"], "separate the values by commas"),
        (["--amounts", "7:100"], "amount '7:100'"),
        (["dagger.round=1"], "did you mean dagger.rounds"),
    ],
)
def test_a_study_that_cannot_work_is_refused(tmp_path, arguments, problem, capsys):
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), *arguments])
    assert problem in " ".join(capsys.readouterr().err.split())


def test_a_partial_study_has_a_page_and_a_result(tmp_path, capsys):
    for number, cell in enumerate(PLAN.all_cells()):
        if number != 5:
            save(tmp_path / "outcomes" / f"{cell.name}.json", make_outcome(cell, 12 if cell.arm == "dagger" else 8))
    arguments = ["--out", str(tmp_path), *SIZE, "--page-only", "--control-seeds", "0"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("RESULT "))
    assert (result["runs"], result["pending_runs"], result["unmatched"]) == (15, 1, [])
    assert result["difference_points"] == pytest.approx(20)
    assert "15 of 16 runs are finished." in (tmp_path / "methods.html").read_text()
    cell = next(PLAN.all_cells())
    save(tmp_path / "outcomes" / f"{cell.name}.json", make_outcome(cell, 8, labels=(90, 190, 290)))
    assert main(arguments) == 1
    assert f"{cell.name}: trained on (90, 190, 290) labels" in capsys.readouterr().out
