"""R2E-Gym's rows: a task is a commit of a repository. The image has the commit's parent, and the tests outside git.

A patch is judged as in R2E-Gym: every test must end, passed or failed, as it did for the real commit.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import END, START
from megatron_dagger.envs.swe.rows import Row, require_fields
from megatron_dagger.envs.swe.task import WORKDIR, SweTask

LOG_PARSER = "r2e_gym"
HIDDEN = ("r2e_tests", "run_tests.sh", "/r2e_tests", "/root/r2e_tests", "/root/run_tests.sh")
STARTUP = f"export PATH={WORKDIR}/.venv/bin:/root/.venv/bin:/root/.local/bin:$PATH"
EVAL_SCRIPT = f"""\
#!/bin/bash
set -uxo pipefail
{STARTUP}
cd {WORKDIR}
for tests in /root/r2e_tests /r2e_tests; do
    [ -e r2e_tests ] || [ ! -d $tests ] || ln -s $tests r2e_tests
done
for script in /root/run_tests.sh run_tests.sh; do
    [ ! -f $script ] || break
done
: '{START}'
bash $script
: '{END}'
"""
_ISSUE = re.compile(r"\[ISSUE\](.*)\[/ISSUE\]", re.DOTALL)


def r2e_gym_task(row: Row) -> SweTask:
    """Return a row's task. Raises ConfigError with the reason if the row cannot be used."""
    fields = ("repo_name", "docker_image", "commit_hash", "problem_statement", "expected_output_json")
    require_fields(row, fields, "it is not a row of R2E-Gym")
    issue = _ISSUE.search(row["problem_statement"])
    try:
        outcomes = json.loads(row["expected_output_json"])
    except ValueError as error:
        raise ConfigError(f"{row['docker_image']}: expected_output_json is not valid JSON ({error})") from error
    return SweTask(
        instance_id=f"{row['repo_name']}__{row['commit_hash'][:12]}",
        repo=row["repo_name"],
        base_commit=row["commit_hash"],
        image=row["docker_image"],
        problem_statement=(issue[1] if issue else row["problem_statement"]).strip(),
        eval_script=EVAL_SCRIPT,
        log_parser=LOG_PARSER,
        patch=_gold_patch(row.get("parsed_commit_content")),
        expected_outcomes=tuple(sorted(outcomes.items())),
        hidden=HIDDEN,
        startup=STARTUP,
    )


def _gold_patch(content: Any) -> str:
    """Return the commit's changes outside the tests as a patch; empty if the row does not contain them."""
    if not content:
        return ""
    parsed = json.loads(content) if isinstance(content, str) else content
    parts = []
    for change in parsed.get("file_diffs", ()):
        path = change["header"]["file"]["path"]
        if not re.search(r"(^|/)(tests?/|test_|conftest)|_test\.py$", path):
            parts.append(_diff(path, change.get("old_file_content"), change.get("new_file_content")))
    return "".join(parts)


def _diff(path: str, old: str | None, new: str | None) -> str:
    names = (f"a/{path}" if old else "/dev/null", f"b/{path}" if new else "/dev/null")
    mode = "" if old and new else f"{'deleted' if old else 'new'} file mode 100644\n"
    lines = difflib.unified_diff((old or "").splitlines(True), (new or "").splitlines(True), *names)
    body = "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)
    return f"diff --git a/{path} b/{path}\n{mode}{body}" if body else ""
