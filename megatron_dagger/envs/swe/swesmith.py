"""SWE-smith's rows: ``patch`` puts a bug into a working repository; the task is to undo it.

The image has the repository without the bug. The files with the failing tests are hidden from the agent, as in
SWE-smith's own branches, and the tests of those files are judged. Unlike in SWE-smith's grading, a test that did not
run counts as failed: a module that cannot be imported is no repair.
"""

from __future__ import annotations

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import eval_script, quoted
from megatron_dagger.envs.swe.rows import Row, ids_of, require_fields, tests_to_pass
from megatron_dagger.envs.swe.task import WORKDIR, SweTask

TEST_COMMAND = "pytest -rA --disable-warnings --color=no --tb=no --verbose"


def swesmith_task(row: Row) -> SweTask:
    """Return a row's task. Raises ConfigError with the reason if the row cannot be used."""
    fields = ("instance_id", "repo", "patch", "image_name", "FAIL_TO_PASS", "problem_statement")
    require_fields(row, fields, "it cannot be used (SWE-smith has bugs without an issue text)")
    fail_to_pass, pass_to_pass = tests_to_pass(row), ids_of(row.get("PASS_TO_PASS"))
    files = tuple(dict.fromkeys(test.partition("::")[0] for test in fail_to_pass))
    if not all(name.endswith(".py") for name in files):
        raise ConfigError(f"{row['instance_id']}: only pytest tests are supported, not {fail_to_pass[0]}")
    _, _, commit = row["repo"].rpartition(".")
    return SweTask(
        instance_id=row["instance_id"],
        repo=row["repo"],
        base_commit=row.get("base_commit") or commit,
        image=swesmith_image(row["image_name"]),
        problem_statement=row["problem_statement"],
        eval_script=eval_script(f"{TEST_COMMAND} {quoted(files)}", workdir=WORKDIR),
        log_parser="parse_log_pytest",
        patch=row["patch"],
        patch_reversed=True,
        setup_patch=row["patch"],
        fail_to_pass=fail_to_pass,
        pass_to_pass=tuple(test for test in pass_to_pass if test.partition("::")[0] in files),
        hidden=files,
    )


def swesmith_image(name: str) -> str:
    """Return the published image of that name; rows of the first release name it without its publisher."""
    if "/" not in name:
        name = f"jyangballin/{name.replace('__', '_1776_')}"
    return (name if ":" in name else f"{name}:latest").lower()
