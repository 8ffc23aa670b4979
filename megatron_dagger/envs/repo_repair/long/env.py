"""One episode of a long repair: the agent has a shell in a sandbox; real tests judge.

The working directory lasts from one command to the next. An observation is what the command printed and no more, so
the agent has to know, or find out, what state its work is in.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex

from megatron_dagger.envs.base import Observation, truncate
from megatron_dagger.envs.repo_repair.env import plain_words
from megatron_dagger.envs.repo_repair.episode import RepairEpisode, Tree
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.testing import SETTINGS_FILE
from megatron_dagger.sandbox.base import CommandResult
from megatron_dagger.sandbox.local import ProcessSandbox, SandboxPool

SYSTEM_MESSAGE = """\
Tokens of a Python package are wrong. A line of todo/list says where one is and what it must be, or only the number of
the rule that it breaks. The same line of todo/more says more, that of todo/tests has its tests.
Reply with one shell command. When all is repaired, tested and committed: submit."""
OBSERVATION_CHARACTERS = 600

# Commits have constant dates, so that a replayed episode prints the same hashes.
_DATE = "2020-01-01T00:00:00Z"
_SHELL = f"""\
HOME=$PWD; export HOME GIT_AUTHOR_DATE={_DATE} GIT_COMMITTER_DATE={_DATE} GIT_PAGER=cat PAGER=cat
cd -- %s 2>/dev/null
trap 'printf "\\0%%s\\0%%s" "$HOME" "$PWD"' EXIT
eval %s
"""
_PYTEST_ON_LINE = re.compile(r"(head -1 [\w./~]+) \| xargs pytest")
_GIT_CONFIG = b"[user]\n\tname = agent\n\temail = agent@localhost\n[gc]\n\tauto = 0\n[advice]\n\tdetachedHead = false\n"


class LongRepairEnv(RepairEpisode):
    """The Env of one long RepairTask; ``files`` are its repository, ``.git`` included."""

    def __init__(self, task: RepairTask, files: Tree, pool: SandboxPool):
        super().__init__(task, files, pool)
        self._cwd = "."  # relative to the root of the work tree, or absolute outside it

    def reset(self) -> tuple[str, str]:
        self._sandbox = self._sandbox or self._pool.take()
        self._cwd = "."
        settings = json.dumps(self.task.tool_settings()).encode()
        config = self._files.get(".git/config", b"") + _GIT_CONFIG
        start = f"{self.task.base_commit}\n".encode()
        self._sandbox.write(
            {
                **self._files,
                SETTINGS_FILE: settings,
                ".git/config": config,
                ".git/info/exclude": b"/.repair/\n",
                ".git/refs/tags/start": start,
            }
        )
        return SYSTEM_MESSAGE, self.task.problem_statement

    def step(self, command: str) -> Observation:
        sandbox = self._require_sandbox()
        argv = self._pytest_on_line(sandbox, command) or plain_words(command)
        if argv == ["submit"]:
            return Observation(text="submitted", done=True)
        if argv and argv[0] == "pytest":
            result = sandbox.run(["pytest", "--cwd", self._cwd, *argv[1:]])
        else:
            result = self._shell(sandbox, command)
        text = result.output.rstrip("\n")
        if result.timed_out:
            text = f"{text}\nerror: timed out".lstrip()
        return Observation(text=truncate(text, OBSERVATION_CHARACTERS))

    def _pytest_on_line(self, sandbox: ProcessSandbox, command: str) -> list[str] | None:
        """Return the pytest command that ``xargs`` would run, which here needs no new interpreter; None for others."""
        match = _PYTEST_ON_LINE.fullmatch(command)
        line = self._shell(sandbox, match[1]) if match else None
        if line is None or line.exit_code:
            return None
        try:
            return ["pytest", *shlex.split(line.output)]
        except ValueError:
            return None

    def _shell(self, sandbox: ProcessSandbox, command: str) -> CommandResult:
        """Run a command in the working directory that the last one left, and note the one that it leaves."""
        result = sandbox.run(_SHELL % (shlex.quote(self._cwd), shlex.quote(command)))
        output, _, places = result.output.rpartition("\0")
        output, mark, root = output.rpartition("\0")
        if not mark:  # the shell was replaced or killed
            return result
        inside = places == root or places.startswith(root + "/")
        self._cwd = posixpath.relpath(places, root) if inside else places
        return CommandResult(output=output, exit_code=result.exit_code, timed_out=result.timed_out)

    def _submitted(self) -> dict[str, bytes]:
        if self._sandbox is not None or not self._tree:  # closed by the judge, the tree is as it was judged
            self._tree = self._require_sandbox().read(".")
        return super()._submitted()
