"""One episode of a software-engineering task: tool calls in a container, judged in a fresh one."""

from __future__ import annotations

import shlex
from typing import Self

from megatron_dagger.envs.base import CommandResult, EnvironmentBroken, Observation
from megatron_dagger.envs.swe.judge import OpenSandbox, Verdict, judge
from megatron_dagger.envs.swe.repository import changes, prepare
from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.envs.swe.tool_calls import FormatError, parse_tool_call, tool_response, tools_message
from megatron_dagger.envs.swe.tools import BASH, EDITOR, SUBMIT, TOOLS, Editor
from megatron_dagger.sandbox.docker.sandbox import DockerSandbox

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
MOST_OBSERVATION_CHARACTERS = 12_000


class SweEnv:
    """The Env of one SweTask. ``open_sandbox`` makes a fresh container of the task's image."""

    def __init__(
        self,
        task: SweTask,
        open_sandbox: OpenSandbox,
        *,
        most_observation_characters: int = MOST_OBSERVATION_CHARACTERS,
    ):
        self.task_id = task.instance_id
        self.task = task
        self.format_errors = 0
        self.verdict: Verdict | None = None
        self._open_sandbox = open_sandbox
        self._most_characters = most_observation_characters
        self._sandbox: DockerSandbox | None = None
        self._base = ""
        self._patch: str | None = None

    def reset(self) -> tuple[str, str]:
        self.close()
        self.format_errors, self.verdict = 0, None
        self._sandbox = self._open_sandbox(self.task)
        self._base = prepare(self._sandbox, self.task)
        self._sandbox.run(f"cd {shlex.quote(self.task.workdir)}; {self.task.startup}")
        message = TASK_MESSAGE.format(workdir=self.task.workdir, problem_statement=self.task.problem_statement)
        return SYSTEM_MESSAGE, message

    def step(self, command: str) -> Observation:
        sandbox = self._opened()
        try:
            call = parse_tool_call(command, TOOLS)
        except FormatError as error:
            self.format_errors += 1
            return Observation(text=tool_response(f"error: {error}"), understood=False)
        if call.name == SUBMIT.name:
            return Observation(text=tool_response("submitted"), done=True)
        if call.name == EDITOR.name:
            text = Editor(sandbox).answer(call.arguments)
        else:
            assert call.name == BASH.name
            text = _describe(sandbox.run(call.arguments["command"]), sandbox.limits.timeout_s)
        return Observation(text=tool_response(clip(text, self._most_characters)))

    def patch(self) -> str | None:
        """What the agent changed, as git's patch; None where it left no repository to tell it."""
        return changes(self._opened(), self.task, self._base)

    def judge(self) -> bool:
        self._patch = patch = self.patch()
        if not patch:
            self.verdict = Verdict(resolved=False, reason="no repository is left" if patch is None else "no change")
        else:
            self.verdict = judge(self._open_sandbox, self.task, patch)
        return self.verdict.resolved

    def report(self) -> dict[str, object]:
        """The patch, and why it does not resolve the task."""
        assert self.verdict is not None, "asked after judge"
        return {"patch": self._patch or "", "verdict": self.verdict.reason}

    def close(self) -> None:
        """Remove the container. May be called twice."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _opened(self) -> DockerSandbox:
        if self._sandbox is None:
            raise EnvironmentBroken("the episode has not been reset, or is closed")
        return self._sandbox


def clip(text: str, limit: int) -> str:
    """The head and the tail of a text of more than ``limit`` characters, and how much was cut between."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters cut ...\n{text[-half:]}"


def _describe(result: CommandResult, timeout_s: float) -> str:
    text = result.output.rstrip("\n")
    if result.timed_out:
        return f"{text}\n[timed out after {timeout_s:g} s; all it had started was killed]".lstrip()
    if result.exit_code:
        return f"{text}\n[exit code {result.exit_code}]".lstrip()
    return text or "[no output]"
