"""Judge a patch: apply it in a fresh container, run the task's tests there, and grade their log.

Scripts, log parsers and grading are those of swebench 5.x; R2E-Gym's rows are compared as R2E-Gym does. Only the patch
reaches that container, and test files are put in place after it, so it cannot change them.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dagger.config.base import ConfigError
from megatron_dagger.envs.swe.assets import with_assets
from megatron_dagger.envs.swe.patch import file_name
from megatron_dagger.envs.swe.r2e_gym import LOG_PARSER as R2E_GYM
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.base import EnvironmentBroken, FileSandbox
from megatron_dagger.text import split_lines

TEST_TIMEOUT_S = 1800.0
APPLY_TIMEOUT_S = 120.0
LOG_BYTES = 32 << 20
PATCH_FILE, SCRIPT_FILE, ASIDE = "/tmp/patch.diff", "/eval.sh", "/.judge"
# Tried in this order, each on a clean tree, as in swebench's harness.
APPLY = (
    "git apply --verbose",
    "git apply --verbose --3way",
    "git apply --verbose --reject",
    "patch --batch --forward --fuzz=5 -p1 -i",
)

IDENTITY = (
    "git config --global --add safe.directory '*'; "
    "git config --global user.name judge; git config --global user.email judge@localhost"
)
# The setup patch is committed: between attempts to apply the agent's patch, the tree is reset to the last commit.
SET_UP = "commit() { git apply $1 && git add -A && git commit -q --no-verify -m setup; }; commit"

# A line of a hunk cannot match: it begins with a blank, a plus or a minus, and only a header is followed by "@@".
_HEADER = re.compile(r"^--- (.+)\n\+\+\+ (.+)\n@@|^diff --git (\S+) (\S+)$|^(?:rename|copy) to (.+)$", re.MULTILINE)

# Opens a sandbox with the task's image, whose directory and exported variables persist from command to command.
OpenSandbox = Callable[[SweTask], FileSandbox]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a patch resolves its task, the reason if not, and the tests' log."""

    resolved: bool
    reason: str = ""
    log: str = field(default="", repr=False)


def judge(open_sandbox: OpenSandbox, task: SweTask, patch: str, *, reverse: bool = False) -> Verdict:
    """Run the task's tests with a patch (empty: without one; ``reverse``: the patch undone) and grade their log.

    Raises EnvironmentBroken if the sandbox fails, ConfigError if swebench is not installed.
    """
    with open_sandbox(task) as sandbox:
        workdir = shlex.quote(task.workdir)
        sandbox.run(f"cd {workdir}; {IDENTITY}")
        if task.setup_patch and not _apply(sandbox, task.setup_patch, (SET_UP,)):
            raise EnvironmentBroken(f"{task.instance_id}: its setup patch does not apply in image {task.image}")
        aside = _set_aside(sandbox, task)
        if _reaches_beyond(patch):
            return Verdict(resolved=False, reason="the patch reaches beyond the repository")
        if patch.strip():
            commands = tuple(f"{command} --reverse" for command in APPLY[:1]) if reverse else APPLY
            if not _apply(sandbox, patch, commands):
                return Verdict(resolved=False, reason="the patch does not apply")
        _put_back(sandbox, aside)
        sandbox.write_file(SCRIPT_FILE, with_assets(_script(task), sandbox, task.assets).encode())
        result = sandbox.run(f"bash {SCRIPT_FILE}", timeout_s=TEST_TIMEOUT_S, output_bytes=LOG_BYTES)
    if result.timed_out:
        return Verdict(resolved=False, reason=f"the tests took over {TEST_TIMEOUT_S:.0f} s", log=result.output)
    return grade(task, result.output)


def grade(task: SweTask, log: str) -> Verdict:
    """Grade the log of a task's tests. Raises ConfigError if swebench is needed and not installed."""
    if task.log_parser == R2E_GYM:
        return _grade_r2e_gym(task, log)
    get_eval_report, make_test_spec = _harness()
    prediction = {"instance_id": task.instance_id, "model_name_or_path": "judge", "model_patch": "patch"}
    with tempfile.TemporaryDirectory(prefix="megatron-dagger-judge-") as folder:
        path = Path(folder, "test_output.txt")
        path.write_text(log, errors="surrogateescape")
        report = get_eval_report(make_test_spec(task.harness_row()), prediction, str(path), include_tests_status=True)
    outcome = report[task.instance_id]
    if outcome["resolved"]:
        return Verdict(resolved=True, log=log)
    if not outcome["patch_successfully_applied"]:
        return Verdict(resolved=False, reason="the log shows no test run", log=log)
    failed = [test for tests in outcome["tests_status"].values() for test in tests["failure"]]
    return Verdict(resolved=False, reason=f"{len(failed)} tests do not pass, such as {failed[:3]}", log=log)


def _harness() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return swebench's get_eval_report and make_test_spec. Raises ConfigError if it is not installed."""
    try:
        from swebench.harness.grading import get_eval_report
        from swebench.harness.utils import make_test_spec
    except ImportError as error:
        raise ConfigError(f"judging needs swebench 5.x ({error}): pip install 'megatron-dagger[swe]'") from error
    return get_eval_report, make_test_spec


def _grade_r2e_gym(task: SweTask, log: str) -> Verdict:
    _, header, summary = re.sub(r"\x1b\[[0-9;]*m", "", log).partition("short test summary info")
    outcomes = {}
    for line in split_lines(summary) if header else ():
        status = next((word for word in ("PASSED", "FAILED", "ERROR") if word in line), None)
        if status:
            outcomes[".".join(line.split("::")[1:]).partition(" - ")[0]] = status
    expected = {re.sub(r"\x1b\[[0-9;]*m", "", name).partition(" - ")[0]: end for name, end in task.expected_outcomes}
    wrong = [name for name in expected.keys() | outcomes.keys() if name and expected.get(name) != outcomes.get(name)]
    if not wrong and outcomes:
        return Verdict(resolved=True, log=log)
    reason = f"{len(wrong)} tests end otherwise, such as {sorted(wrong)[:3]}" if outcomes else "no test has run"
    return Verdict(resolved=False, reason=reason, log=log)


def _script(task: SweTask) -> str:
    """Return the task's script; swebench's marks in it are extended to record the exit code of the tests."""
    if task.log_parser == R2E_GYM:
        return task.eval_script
    _, make_test_spec = _harness()
    return str(make_test_spec(task.harness_row()).eval_script)


def _apply(sandbox: FileSandbox, patch: str, commands: tuple[str, ...]) -> bool:
    """Apply a patch by the first command that succeeds; return whether it is applied."""
    sandbox.write_file(PATCH_FILE, patch.encode(errors="surrogateescape"))
    for number, command in enumerate(commands):
        if number:  # a failed command may have applied half of the patch
            sandbox.run("git checkout -- . ; git clean -fdq", timeout_s=APPLY_TIMEOUT_S)
        if sandbox.run(f"{command} {PATCH_FILE}", timeout_s=APPLY_TIMEOUT_S).exit_code == 0:
            return True
    return len(commands) > 1 and sandbox.run(f"git apply --check --reverse {PATCH_FILE}").exit_code == 0


def _reaches_beyond(patch: str) -> bool:
    """Return whether a patch names a file outside the tree or in .git. Git refuses those, ``patch`` not all of them."""
    names = [file_name(name) for header in _HEADER.findall(patch) for name in header if name]
    parts = [part for name in names if name != "/dev/null" for part in name.split("/")]
    return any(part in ("", "..", ".git") for part in parts)


def _set_aside(sandbox: FileSandbox, task: SweTask) -> list[tuple[str, str]]:
    """Move the hidden files out of the patch's way; return pairs of (where a file is now, where it belongs)."""
    moves = []
    for number, name in enumerate(task.hidden):
        place, source = f"{ASIDE}/{number}", shlex.quote(name)
        if sandbox.run(f"[ -e {source} ] && mkdir -p {ASIDE} && mv {source} {place}").exit_code == 0:
            moves.append((place, name))
    return moves


def _put_back(sandbox: FileSandbox, moves: list[tuple[str, str]]) -> None:
    """Undo ``_set_aside``. Raises EnvironmentBroken if a file cannot be moved."""
    for place, name in moves:
        target = shlex.quote(name)
        result = sandbox.run(f'rm -rf {target}; mkdir -p "$(dirname {target})" && mv {place} {target}')
        if result.exit_code:
            raise EnvironmentBroken(f"hidden file {name} cannot be put back: {result.output}")
