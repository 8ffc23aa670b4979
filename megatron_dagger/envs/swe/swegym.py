"""SWE-Gym's rows (full and Lite): SWE-bench's older schema, with SWE-Gym's own images and test commands.

Test commands by repository, their set-up and the log parsers are those of SWE-Gym's fork of the SWE-bench harness
(harness/constants, make_eval_script_list, log_parsers), except that packages are not installed again, which would need
a network. `megatron-dagger validate` shows whether such a script judges its task correctly.
"""

from __future__ import annotations

import re

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.patch import changed_files
from megatron_dagger.envs.swe.pytest_script import eval_script, quoted
from megatron_dagger.envs.swe.rows import Row, ids_of, require_fields, tests_to_pass
from megatron_dagger.envs.swe.task import WORKDIR, SweTask

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
# Its pytest plugin prints one coloured line per test and no summary; the fork has a variant of this parser for it.
LOG_PARSERS = {"pydantic/pydantic": "parse_log_pytest_v2"}
_CASE = re.compile(r"\[case ([^\]]+)\]")  # in mypy's data files, whose tests are selected by name, not by file
HELD_OUT = 100  # of SWE-Gym's 2,438 tasks, as in published runs


def swegym_task(row: Row) -> SweTask:
    """Return a row's task. Raises ConfigError with the reason if the row cannot be used."""
    fields = ("instance_id", "repo", "base_commit", "problem_statement", "test_patch", "FAIL_TO_PASS")
    require_fields(row, fields, "it is not a row of SWE-Gym")
    repo = row["repo"].lower()
    if repo not in TEST_COMMANDS:
        known = ", ".join(sorted(TEST_COMMANDS))
        raise ConfigError(f"{row['instance_id']}: no test command is known for {row['repo']}, only for {known}")
    return SweTask(
        instance_id=row["instance_id"],
        repo=row["repo"],
        base_commit=row["base_commit"],
        image=swegym_image(row["instance_id"]),
        problem_statement=row["problem_statement"],
        eval_script=eval_script(
            "\n".join([*filter(None, [SET_UP.get(repo)]), f"{TEST_COMMANDS[repo]} {_chosen_tests(row)}"]),
            workdir=WORKDIR,
            base_commit=row["base_commit"],
            test_patch=row["test_patch"],
        ),
        log_parser=LOG_PARSERS.get(repo, "parse_log_pytest"),
        version=row.get("version") or "",
        patch=row.get("patch") or "",
        fail_to_pass=tests_to_pass(row),
        pass_to_pass=ids_of(row.get("PASS_TO_PASS")),
    )


def _chosen_tests(row: Row) -> str:
    """Return pytest's arguments for the tests of the test patch. Raises ConfigError if they cannot be run."""
    name, patch = row["instance_id"], row["test_patch"]
    changes = changed_files(patch)
    binary = [change.after or change.before for change in changes if not change.complete]
    if binary:
        raise ConfigError(f"{name}: the test patch lacks the content of {', '.join(binary)}, so git cannot apply it")
    cases = dict.fromkeys(_CASE.findall(patch)) if row["repo"].lower() == "python/mypy" else {}
    if cases:
        return f"-k {quoted([' or '.join(cases)])}"
    files = [change.after for change in changes if change.after.endswith(".py")]
    if not files:
        raise ConfigError(f"{name}: the test patch has no Python file that could be run")
    return quoted(files)


def swegym_image(instance_id: str) -> str:
    """Return the image that SWE-Gym publishes for an instance."""
    return f"xingyaoww/sweb.eval.x86_64.{instance_id.replace('__', '_s_')}:latest".lower()
