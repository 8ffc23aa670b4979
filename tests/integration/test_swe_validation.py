"""Validation of SWE tasks in real containers, by function calls and on the command line."""

import dataclasses
import json

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.config import SweConfig, override
from megatron_dagger.envs.swe.load import load_tasks
from megatron_dagger.envs.swe.validation import TaskStatus, validate_tasks
from megatron_dagger.sandbox.docker.daemon import RUN_LABEL
from tests.integration.swe_episodes import BUG
from tools.support import swe_image


@pytest.mark.slow
def test_tasks_are_validated_with_the_gold_patch_and_without(calc_task, open_sandbox):
    opened = []

    def open_variant(task):
        """Open a container; break it every other time for the task called flaky."""
        sandbox = open_sandbox(task)
        if task.instance_id == "flaky":
            opened.append(task)
            if len(opened) % 2:
                sandbox.run("rm -rf calc .git")
        return sandbox

    variants = {
        "good": {},
        "wrong-gold": {"patch": swe_image.PATCH.replace("+    return sum(values) / len(values)", "+    return 7")},
        "no-gold": {"patch": ""},
        "already": {"fail_to_pass": calc_task.pass_to_pass},
        "missing": {"image": "nowhere/image:1"},
        "flaky": {},
    }
    tasks = [dataclasses.replace(calc_task, instance_id=name, **changes) for name, changes in variants.items()]
    validations = [
        *validate_tasks(tasks[:-1], open_variant, repeats=1, at_once=2),
        *validate_tasks(tasks[-1:], open_variant, repeats=2),
    ]
    assert {row.instance_id: row.status for row in validations} == {
        "good": TaskStatus.VALID,
        "wrong-gold": TaskStatus.GOLD_FAILS,
        "no-gold": TaskStatus.NO_GOLD,
        "already": TaskStatus.PASSES_UNCHANGED,
        "missing": TaskStatus.BROKEN,
        "flaky": TaskStatus.FLAKY,
    }
    assert (validations[-1].gold, validations[-1].unchanged) == ((False, True), (False, False))


def test_a_dataset_is_validated_by_the_command_line_and_a_run_takes_its_valid_tasks(
    calc_task, docker_host, daemon, tmp_path, capsys
):
    good = swe_image.row(calc_task.base_commit)
    wrong = good | {
        "instance_id": "example__calc-2",
        "patch": swe_image.PATCH.replace("+    return", "+    return 7 +"),
    }
    absent = good | {"instance_id": "example__calc-3", "image": "localhost:1/nowhere:1"}
    heldout = good | {"instance_id": "example__calc-4", "base_commit": "0" * 40, "patch": BUG}
    for name, rows in (("train", (good, wrong, absent)), ("heldout", (heldout,))):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    datasets = [f"swe.{name}={tmp_path / name}.jsonl" for name in ("train", "heldout")]
    limits = ["swe.memory_mib=500", "swe.cpus=1.0", f"swe.docker_url={daemon.url}"]
    path = tmp_path / "out" / "validation.json"
    command = ["validate", str(path), "--repeats", "1", *datasets, "swe.train_dataset=swe-bench", *limits]
    assert main(command) == 1
    assert "example__calc-2" in capsys.readouterr().out
    rows_by_id = json.loads(path.read_text())["tasks"]
    assert {name[-1]: row["status"] for name, row in rows_by_id.items()} == {
        "1": "valid",
        "2": "gold_fails",
        "3": "broken",
    }
    rows = (good, wrong, good | {"instance_id": "example__calc-3", "FAIL_TO_PASS": good["PASS_TO_PASS"]})
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    rows_by_id["example__calc-2"]["reason"] = "seen before"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": rows_by_id}))
    assert main(command) == 0  # only the broken task is validated again
    updated = json.loads(path.read_text())["tasks"]
    assert updated["example__calc-2"]["reason"] == "seen before"
    assert updated["example__calc-3"]["status"] == "passes_unchanged"
    assert main([*command, "--repeats", "2"]) == 2
    assert "name another file" in capsys.readouterr().err
    settings = [
        *(setting.removeprefix("swe.") for setting in datasets),
        "train_dataset=swe-bench",
        f"validation={path}",
    ]
    taken, _ = load_tasks(override(SweConfig(), settings))
    assert [task.instance_id for task in taken] == ["example__calc-1"]
    assert not docker_host.client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={path.resolve()}"})
