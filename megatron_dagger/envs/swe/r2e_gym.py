"""R2E-Gym's rows: a task is a commit of a repository. The image has the commit's parent, and the tests outside git.

A patch is judged as in R2E-Gym: every test must end, passed or failed, as it did for the real commit.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.pytest_script import END, START
from megatron_dagger.envs.swe.rows import Row, require_fields
from megatron_dagger.envs.swe.task import WORKDIR, SweTask
from megatron_dagger.text import parse_json, split_lines

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
        outcomes = parse_json(row["expected_output_json"])
    except ValueError as error:
        raise ConfigError(f"{row['docker_image']}: expected_output_json is not valid JSON ({error})") from error
    if not outcomes:
        raise ConfigError(f"{row['docker_image']}: expected_output_json names no test, so no patch can be judged")
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
    parsed = parse_json(content) if isinstance(content, str) else content
    parts = []
    for change in parsed.get("file_diffs", ()):
        path = change["header"]["file"]["path"]
        if not re.search(r"(^|/)(tests?/|test_|conftest)|_test\.py$", path):
            parts.append(_diff(path, _content(change, "old", "minus"), _content(change, "new", "plus")))
    return "".join(parts)


def _content(change: Mapping[str, Any], version: str, side: str) -> str | None:
    """Return a file's content before (``old``, ``minus``) or after the commit; None if it did not exist."""
    content: str | None = change.get(f"{version}_file_content")
    file = change.get(f"{side}_file")
    exists = file["path"] != "/dev/null" if file else bool(content)
    return (content or "") if exists else None


def _diff(path: str, old: str | None, new: str | None) -> str:
    """Return a file's part of a patch; empty if nothing changes."""
    names = ("/dev/null" if old is None else f"a/{path}", "/dev/null" if new is None else f"b/{path}")
    mode = "new file mode 100644\n" if old is None else "deleted file mode 100644\n" if new is None else ""
    lines = [split_lines(text or "", keepends=True) for text in (old, new)]
    body = "".join(
        line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
        for line in difflib.unified_diff(lines[0], lines[1], *names)
    )
    return f"diff --git a/{path} b/{path}\n{mode}{body}" if old != new else ""
