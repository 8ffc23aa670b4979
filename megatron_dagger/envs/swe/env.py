"""One episode of a software-engineering task: tool calls in a container, a patch judged in a fresh one."""

from __future__ import annotations

import shlex
from typing import Self

from megatron_dagger.config import SweConfig
from megatron_dagger.envs.base import Observation, truncate
from megatron_dagger.envs.swe.judge import OpenSandbox, Verdict, judge
from megatron_dagger.envs.swe.repository import Changes, changes, prepare
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.envs.swe.tool_calls import FormatError, parse_tool_call, tool_response, tools_message
from megatron_dagger.envs.swe.tools import EDITOR, SUBMIT, TOOLS, Editor
from megatron_dagger.sandbox.base import CommandResult, EnvironmentBroken, FileSandbox

SYSTEM_MESSAGE = f"""\
You are a software engineer at work in a Linux container. Solve the issue that you are given by changing the
repository. Reply with one tool call at a time.

{tools_message(TOOLS)}"""
TASK_MESSAGE = """\
The repository is in {workdir}. Solve this issue:

<issue>
{problem_statement}
</issue>

Change what has to be changed outside of the tests. The issue's tests, which you do not see, decide.
Call submit when you are done."""


class SweEnv:
    """The Env of one SweTask.

    ``open_sandbox`` opens a new sandbox with the task's image, for the episode and again for the judge. Longer
    observations than ``observation_characters`` are truncated in the middle.
    """

    def __init__(
        self,
        task: SweTask,
        open_sandbox: OpenSandbox,
        *,
        observation_characters: int = SweConfig.observation_characters,
    ):
        self.task_id = task.instance_id
        self.task = task
        self.verdict: Verdict | None = None
        self._open_sandbox = open_sandbox
        self._observation_characters = observation_characters
        self._sandbox: FileSandbox | None = None
        self._base = ""
        self._changes = Changes(patch=None)

    def reset(self) -> tuple[str, str]:
        self.close()
        self.verdict = None
        self._sandbox = self._open_sandbox(self.task)
        self._base = prepare(self._sandbox, self.task)
        self._sandbox.run(f"cd {shlex.quote(self.task.workdir)}; {self.task.startup}")
        message = TASK_MESSAGE.format(workdir=self.task.workdir, problem_statement=self.task.problem_statement)
        return SYSTEM_MESSAGE, message

    def step(self, command: str) -> Observation:
        sandbox = self._require_sandbox()
        try:
            call = parse_tool_call(command, TOOLS)
        except FormatError as error:
            return Observation(text=tool_response(f"error: {error}"), understood=False)
        if call.name == SUBMIT.name:
            return Observation(text=tool_response("submitted"), done=True)
        if call.name == EDITOR.name:
            text = Editor(sandbox).answer(call.arguments)
        else:
            text = _describe(sandbox.run(call.arguments["command"]), sandbox.limits.timeout_s)
        return Observation(text=tool_response(truncate(text, self._observation_characters)))

    def changes(self) -> Changes:
        """Return the agent's changes so far."""
        return changes(self._require_sandbox(), self.task, self._base)

    def judge(self) -> bool:
        self._changes = result = self.changes()
        if result.patch is None:
            self.verdict = Verdict(resolved=False, reason=f"the changes cannot be told: {result.left_out}")
        elif not result.patch:
            self.verdict = Verdict(resolved=False, reason="no change")
        else:
            self.verdict = judge(self._open_sandbox, self.task, result.patch)
        return self.verdict.resolved

    def report(self) -> dict[str, object]:
        """Return the patch, what it lacks, and why it does not resolve the task.

        Raises RuntimeError before ``judge``.
        """
        if self.verdict is None:
            raise RuntimeError(f"{self.task_id}: the episode is not judged yet, so there is nothing to report")
        left_out = {"left_out": self._changes.left_out} if self._changes.left_out else {}
        return {"patch": self._changes.patch or "", "verdict": self.verdict.reason, **left_out}

    def close(self) -> None:
        """Close the sandbox. May be called twice."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _require_sandbox(self) -> FileSandbox:
        if self._sandbox is None:
            raise EnvironmentBroken("the episode has not been reset, or is closed")
        return self._sandbox


def _describe(result: CommandResult, timeout_s: float) -> str:
    text = result.output.rstrip("\n")
    if result.timed_out:
        return f"{text}\n[timed out after {timeout_s:g} s; all it had started was killed]".lstrip()
    if result.exit_code:
        return f"{text}\n[exit code {result.exit_code}]".lstrip()
    return text or "[no output]"
