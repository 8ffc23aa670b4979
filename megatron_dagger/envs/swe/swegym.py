"""SWE-Gym's rows (full and Lite): SWE-bench's older schema, with images and test commands of their own.

The test commands by repository, their set-up and the log parsers are those of SWE-Gym's fork of the SWE-bench
harness (harness/constants, make_eval_script_list, log_parsers), but for its installation of each package again,
which would need a network. Whether a script made of them judges a task rightly shows in its admission, by gold
patch and no-op.
"""

from __future__ import annotations

import re

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import eval_script, patched_files, quoted
from megatron_dagger.envs.swe.rows import Row, ids_of, require_fields
from megatron_dagger.envs.swe.task import SweTask

TEST_COMMANDS = {
    "bokeh/bokeh": "pytest -rA -n0",
    "conan-io/conan": "pytest -n0 -rA",
    "dask/dask": "pytest -n0 -rA --color=no",
    "facebookresearch/hydra": "pytest -rA --tb=long",
    "getmoto/moto": "pytest -n0 -rA",
    "iterative/dvc": "pytest -rA",
    "modin-project/modin": "pytest -n0 -rA",
    "pandas-dev/pandas": "pytest -rA --tb=long",
    "project-monai/monai": "pytest -rA",
    "pydantic/pydantic": "pytest -rA --tb=short -vv -o console_output_style=classic --no-header",
    "python/mypy": "pytest -n0 -rA",
}
SET_UP = {"conan-io/conan": "export PYTHONPATH=${PYTHONPATH:-}:$(pwd)"}
# Its plugin prints a line a test, with colours, and no summary; the fork has a variant of this parser for it.
LOG_PARSERS = {"pydantic/pydantic": "parse_log_pytest_v2"}
_CASE = re.compile(r"\[case ([^\]]+)\]")  # of mypy's data files, whose tests are chosen by name, not by file
WORKDIR = "/testbed"
HELD_OUT = 100  # of its 2,438 tasks, in published runs


def swegym_task(row: Row) -> SweTask:
    """The task of a row. ConfigError says why a row cannot be used."""
    fields = ("instance_id", "repo", "base_commit", "problem_statement", "test_patch", "FAIL_TO_PASS")
    require_fields(row, fields, "it is no row of SWE-Gym")
    repo = row["repo"].lower()
    if repo not in TEST_COMMANDS:
        known = ", ".join(sorted(TEST_COMMANDS))
        raise ConfigError(f"{row['instance_id']}: no test command is known for {row['repo']}; there are: {known}")
    fail_to_pass = ids_of(row["FAIL_TO_PASS"])
    cases = list(dict.fromkeys(_CASE.findall(row["test_patch"]))) if repo == "python/mypy" else []
    if cases:
        chosen = f"-k {quoted([' or '.join(cases)])}"
    else:
        chosen = quoted([name for name in patched_files(row["test_patch"]) if name.endswith(".py")])
    return SweTask(
        instance_id=row["instance_id"],
        repo=row["repo"],
        base_commit=row["base_commit"],
        image=swegym_image(row["instance_id"]),
        problem_statement=row["problem_statement"],
        eval_script=eval_script(
            "\n".join([*filter(None, [SET_UP.get(repo)]), f"{TEST_COMMANDS[repo]} {chosen}"]),
            workdir=WORKDIR,
            base_commit=row["base_commit"],
            test_patch=row["test_patch"],
        ),
        log_parser=LOG_PARSERS.get(repo, "parse_log_pytest"),
        version=row.get("version") or "",
        patch=row.get("patch") or "",
        fail_to_pass=fail_to_pass,
        pass_to_pass=ids_of(row.get("PASS_TO_PASS")),
    )


def swegym_image(instance_id: str) -> str:
    """Where SWE-Gym publishes an instance's image."""
    return f"xingyaoww/sweb.eval.x86_64.{instance_id.replace('__', '_s_')}:latest".lower()
