"""`megatron-dagger doctor`: on this machine, and on one that lacks everything that a recipe for H100s needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dagger.cli.main import main
from megatron_dagger.driver.doctor import CHECKS

SKIPS = "ranks"  # test_checks.py starts them


def doctor(*arguments, cwd, **variables):
    code = f"import sys; from megatron_dagger.cli.main import main; sys.exit(main({['doctor', *arguments]}))"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": str(Path.cwd()), **variables},
    )  # fmt: skip


def test_what_an_h100_recipe_lacks_here_is_listed_with_the_way_out(tmp_path):
    done = doctor(
        "qwen3_8b_swegym_8h100", "swe.train=rows.jsonl", "--skip", SKIPS, cwd=tmp_path, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 1
    for expected in ("problem  gpus           none visible", "problem  model", "rows.jsonl: no such file", "-> "):
        assert expected in done.stdout
    assert "error: qwen3_8b_swegym_8h100 will not work on" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_a_run_that_does_not_exist_yet_is_examined_with_the_arguments_of_run(tmp_path):
    for argv in (["runs/new", "--recipe", "positive_control", "seed=5", "--take-over"], ["positive_control"]):
        done = doctor(*argv, "--json", "--skip", f"{SKIPS},teacher", cwd=tmp_path)
        answer = json.loads(done.stdout)
        names = {name for name in CHECKS if name not in (SKIPS, "teacher")}
        assert (answer["subject"], set(answer["checks"])) == (argv[0], names)
        assert done.returncode == int(not answer["ok"])
        assert answer["checks"]["tasks"]["status"] == "ok"
        assert not list(tmp_path.iterdir())


def test_a_check_that_hangs_neither_fails_nor_keeps_the_process(tmp_path):
    code = (
        "import sys, time\n"
        "from megatron_dagger.cli import doctor as command, main\n"
        "from megatron_dagger.driver import doctor\n"
        "doctor.CHECKS, command.CHECK_DEADLINE_S = {'slow': lambda _: time.sleep(100)}, 0.2\n"
        "sys.exit(main.main(['doctor', 'positive_control']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "warning  slow" in done.stdout) == (0, True), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one recipe or run directory, not 0"),
        (["nosuch"], "unknown recipe"),
        (["quickstart", "--skip", "nosuch"], "--skip nosuch: choose from packages, gpus"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, message):
    assert main(["doctor", *arguments]) == 2
    assert message in capsys.readouterr().err
