"""Patches graded by SWE-bench's own harness in real containers: on the command line, resumed, and with --check."""

import json
import subprocess
import sys

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.evaluation.harness import Harness
from tests.support.waiting import wait_until
from tools.support import swe_image
from tools.support.docker_engine import processes_with

pytest.importorskip("swebench")

WRONG = swe_image.PATCH.replace("+    return sum(values) / len(values)", "+    return 7")
STRANGE = swe_image.PATCH.replace("sum(values)", "total(values)")
PATCHES = {
    "example__calc-1": swe_image.PATCH,
    "example__calc-2": WRONG,
    "example__calc-3": "",
    "another__calc-4": STRANGE,
}


@pytest.fixture(scope="module")
def row(docker_host):
    return swe_image.row(swe_image.build(docker_host))


@pytest.fixture
def files(row, daemon, tmp_path):
    """Five tasks of two repositories, predictions for four of them, and the options that name them."""
    rows = [{**row, "instance_id": name, "repo": name.partition("-")[0]} for name in (*PATCHES, "another__calc-5")]
    rows[1]["eval_script"] = row["eval_script"].replace("cd /testbed\n", "cd /testbed\nsleep 4\n")
    write_lines(tmp_path / "rows.jsonl", rows)
    predictions = [
        {"instance_id": name, "model_name_or_path": "org/model", "model_patch": patch}
        for name, patch in PATCHES.items()
    ]
    write_lines(tmp_path / "predictions.jsonl", predictions)
    common = ["--tasks", str(tmp_path / "rows.jsonl"), "--docker-url", daemon.url, "--out", str(tmp_path / "graded")]
    return [*common, "--predictions", str(tmp_path / "predictions.jsonl")]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_predictions_are_graded_and_a_killed_grading_resumes(files, tmp_path, docker_host, capsys):
    before = docker_host.client.containers.list(all=True)
    run_id = Harness(directory=tmp_path / "graded", rows=[], predictions=[]).run_id
    done = tmp_path / "graded" / "logs" / "run_evaluation" / run_id / "org__model" / "example__calc-1" / "report.json"
    with subprocess.Popen([sys.executable, "-m", "megatron_dagger.cli.main", "grade", *files]) as killed:
        wait_until(lambda: done.exists() and len(docker_host.client.containers.list()) > len(before), deadline_s=120)
        killed.kill()
    assert processes_with(run_id) == [], "the harness has died with the command that started it"
    assert len(docker_host.client.containers.list(all=True)) > len(before), (
        "and has left the container of the sleeping task"
    )
    written = done.stat().st_mtime_ns

    assert main(["grade", *files]) == 0
    assert done.stat().st_mtime_ns == written, "a task with a report is not run again"
    assert docker_host.client.containers.list(all=True) == before
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "graded" / "report.json").read_text())
    assert report["outcomes"] == {
        "example__calc-1": "resolved",
        "example__calc-2": "unresolved",
        "example__calc-3": "empty_patch",
        "another__calc-4": "patch_does_not_apply",
        "another__calc-5": "no_prediction",
    }
    assert (report["tasks"], report["predictions"], report["resolved"], report["rate"]) == (5, 4, 1, 0.2)
    assert report["repositories"]["example__calc"]["rate"] == pytest.approx(1 / 3)
    assert "example__calc         1       3   33.3%" in printed
    assert report["harness"].startswith("swebench 5.")

    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    (tmp_path / "predictions.jsonl").write_text(lines[0] + "\n")
    assert main(["grade", *files]) == 2, "a different grading needs a different directory"
    assert "belongs to another grading" in capsys.readouterr().err


def test_the_grader_is_checked_with_gold_and_with_empty_patches(row, daemon, tmp_path, capsys):
    passing = {**row, "instance_id": "a__already-1", "FAIL_TO_PASS": row["PASS_TO_PASS"]}
    write_lines(tmp_path / "rows.jsonl", [row, passing, {**row, "instance_id": "a__wrong-2", "patch": WRONG}])
    options = ["--tasks", str(tmp_path / "rows.jsonl"), "--docker-url", daemon.url, "--out", str(tmp_path / "check")]
    assert main(["grade", "--check", *options]) == 1
    report = json.loads((tmp_path / "check" / "report.json").read_text())
    assert report["holds"] is False
    assert report["outcomes"][row["instance_id"]] == {"gold": "resolved", "none": "unresolved"}
    assert report["gold_does_not_resolve"] == ["a__wrong-2"]
    assert report["none_resolves"] == ["a__already-1"]
    assert "gold_does_not_resolve: a__wrong-2" in capsys.readouterr().out


def test_a_grading_that_is_impossible_is_an_error_with_the_reason(row, daemon, files, tmp_path, capsys):
    def grade(*options):
        code = main(["grade", *options])
        return code, capsys.readouterr().err

    write_lines(tmp_path / "rows.jsonl", [{**row, "image": "nowhere/image:1"}])
    assert grade("--check", *files) == (
        2,
        "error: 1 images are missing, such as ['nowhere/image:1']: pull them, or give --pull\n",
    )
    assert "calc-2 is not a task of" in grade(*files)[1]
    write_lines(tmp_path / "predictions.jsonl", [{"instance_id": "example__calc-1", "model_patch": ""}])
    assert "a prediction has no model_name_or_path" in grade(*files)[1]
    assert "give RUN, or --predictions with --tasks and --out" in grade("--tasks", str(tmp_path / "rows.jsonl"))[1]
