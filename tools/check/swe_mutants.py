"""SWE-bench tasks from mutated packages, with Docker images built here, and a teacher that knows the gold patches.

A repair task (a package with one wrong token, and the package's own tests) takes the form of a SWE-bench 5.x task: an
image with the repository in /testbed, an issue, an eval script, the names of the tests. The teacher answers any
conversation with the next tool call of a repair (view, edit, run the tests, submit) and ignores the student's turns in
between. This shows on a machine without a language model that a round works, not how hard a task is.
"""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dagger.envs.repo_repair.repository import read_repository
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.swe.pytest_script import eval_script, quoted
from megatron_dagger.envs.swe.tool_calls import ToolCall
from megatron_dagger.sandbox.docker.daemon import DockerHost

WORKDIR = "/testbed"
IMAGE_REPOSITORY = "megatron-dagger-mutant"  # the tag is the task's id
SHOWN_LINES = 12  # around the bug


def image_of(task: RepairTask) -> str:
    return f"{IMAGE_REPOSITORY}:{re.sub(r'[^A-Za-z0-9_.-]', '_', task.instance_id)}"


def row(task: RepairTask) -> dict[str, Any]:
    """Return the task as a row of SWE-bench 5.x."""
    files = sorted({test.partition("::")[0] for test in task.tests})
    paths = ":".join(f"{WORKDIR}/{path}" for path in task.python_paths)
    tests = f"python -m pytest -rA -p no:cacheprovider {quoted(task.pytest_args)} {quoted(files)}"
    restore = f"git checkout {task.base_commit} -- {quoted(files)}"
    environment = f"export PYTHONPATH={paths}:$PYTHONPATH PYTHONDONTWRITEBYTECODE=1"
    return {
        "instance_id": task.instance_id,
        "repo": f"mutants/{task.repo}",
        "version": task.version,
        "base_commit": task.base_commit,
        "problem_statement": task.problem_statement,
        "patch": task.patch,
        "test_patch": "",
        "FAIL_TO_PASS": task.FAIL_TO_PASS,
        "PASS_TO_PASS": task.PASS_TO_PASS,
        "image": image_of(task),
        "eval_script": eval_script(tests, workdir=WORKDIR, activate=f"{environment}; cd {WORKDIR} && {restore}"),
        "log_parser": "parse_log_pytest_v2",
        "eval_type": "pass_and_fail",
    }


def write_rows(path: Path, tasks: Iterable[RepairTask]) -> None:
    path.write_text("".join(json.dumps(row(task)) + "\n" for task in tasks))


def build_images(
    host: DockerHost, base: str, tasks: Iterable[RepairTask], repository: Callable[[RepairTask], Path]
) -> None:
    """Build an image for each task: ``base`` with the task's git repository in /testbed."""
    for task in tasks:
        # The image keeps this stop signal. With the default one SWE-bench's harness waits 15 s for a container to stop.
        container = host.client.api.create_container(base, ["true"], stop_signal="SIGKILL")["Id"]
        try:
            host.client.api.put_archive(container, "/", _archive(read_repository(repository(task))))
            name, _, tag = image_of(task).rpartition(":")
            host.client.api.commit(container, name, tag)
        finally:
            host.remove(container)


class GoldTeacher:
    """Answers chat completion requests by the gold patches. Call it with a request; it returns the reply's text."""

    def __init__(self, tasks: Sequence[RepairTask]):
        self._repairs = {task.problem_statement: _Repair(task) for task in tasks}

    def replies(self, task: RepairTask) -> tuple[str, ...]:
        """Return the replies of an undisturbed repair, in order."""
        repair = self._repairs[task.problem_statement]
        return repair.look, repair.edit, repair.test, repair.submit

    def __call__(self, request: Mapping[str, Any]) -> str:
        messages = request["messages"]
        task = messages[1]["content"]
        repair = next(repair for statement, repair in self._repairs.items() if statement in task)
        answers = {message["content"]: answer["content"] for message, answer in itertools.pairwise(messages)}
        if repair.look not in answers:
            return repair.look
        if repair.edit not in answers:
            return repair.edit
        if "error: " in answers[repair.edit]:  # the student has changed these lines
            return repair.edit_by_force if repair.edit_by_force not in answers else repair.submit
        return repair.test if repair.test not in answers else repair.submit


class _Repair:
    """The replies for one task."""

    def __init__(self, task: RepairTask):
        header, _, hunk = task.patch.partition("\n@@")
        name = header.rpartition("+++ b/")[2].split()[0]
        lines = [line for line in hunk.split("\n")[1:] if line]
        first = int(hunk.partition("-")[2].partition(",")[0])
        old = "\n".join(line[1:] for line in lines if line[0] != "+")
        new = "\n".join(line[1:] for line in lines if line[0] != "-")
        files = quoted(sorted({test.partition("::")[0] for test in task.fail_to_pass}))
        path = f"{WORKDIR}/{name}"
        edit = {"command": "str_replace", "path": path, "old_str": old, "new_str": new}
        self.look = _call("bash", f"sed -n {max(1, first - 1)},{first + SHOWN_LINES}p {name}", "Let me look.")
        self.edit = ToolCall(name="str_replace_editor", arguments=edit).text()
        force = f"git checkout -q HEAD -- {name} && python - <<'END'\np = {path!r}\nt = open(p).read()\n"
        self.edit_by_force = _call("bash", f"{force}open(p, 'w').write(t.replace({old!r}, {new!r}))\nEND")
        tests = f"python -m pytest -q -p no:cacheprovider {files} 2>&1 | tail -n 3"
        self.test = _call("bash", f"{tests} | sed 's/ in [0-9.]*s$//'")  # the same observation each time
        self.submit = ToolCall(name="submit", arguments={}).text()


def _call(name: str, command: str, thought: str = "") -> str:
    call = ToolCall(name=name, arguments={"command": command}).text()
    return f"{thought}\n{call}" if thought else call


def _archive(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{WORKDIR.lstrip('/')}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
