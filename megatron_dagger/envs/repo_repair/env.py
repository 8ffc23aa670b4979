"""One episode of repairing a repository: the agent's commands run in a sandbox, real tests judge.

Every change of the work tree, by whatever command, is one step that ``undo`` reverts. ``undo`` and ``submit`` are
handled here. Everything else runs inside the sandbox: a plain call of a repair tool directly, the rest in a shell.

Every observation ends with the state of the search: the number of open edits and, if there are none, the fixes of the
last line looked at that no test run has failed yet. So the best next action can be inferred from the last observation,
even after a mistake.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_dagger.envs.base import Observation, truncate
from megatron_dagger.envs.repo_repair.episode import RepairEpisode, Tree, changed_files
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.testing import SETTINGS_FILE, SUSPECTS_FILE, TESTED_FILE
from megatron_dagger.envs.repo_repair.tools import line_tools
from megatron_dagger.sandbox.base import CommandResult
from megatron_dagger.sandbox.local import SandboxPool
from megatron_dagger.sandbox.local.server import TruncatedOutput

SYSTEM_MESSAGE = """\
One token of a Python package is wrong. Reply with one shell command, such as
locate, view @K, fix @K N, runtests, undo, submit, edit @K OLD NEW, list, search WORD."""
RUNS_TESTS = frozenset({"runtests", "locate"})
READS_ONLY = RUNS_TESTS | {"list", "search", "view", "untested"}
TOOLS = READS_ONLY | {"fix", "edit"}
TAKES_A_LINE = frozenset({"view", "untested", "fix", "edit"})
OBSERVATION_CHARACTERS = 2000

_QUOTED = re.compile(r"""'[^']*'|"[^"$`\\]*\"""")
_PLAIN = re.compile(r"[\w@%+=:,./\- ]*", re.ASCII)  # characters that mean nothing to a shell

TestMemory = dict[tuple[str, str, str], tuple[CommandResult, bytes | None]]


class RepairEnv(RepairEpisode):
    """The Env of one RepairTask; ``files`` are its repository, ``.git`` included.

    ``memory``, shared by the episodes of a process, caches the agent's test runs by the content of the tree. That is
    sound because a task is accepted only if repeated runs agree. The judge always runs the tests.
    """

    def __init__(self, task: RepairTask, files: Tree, pool: SandboxPool, memory: TestMemory | None = None):
        super().__init__(task, files, pool)
        self._memory = memory
        self._history: list[dict[str, bytes]] = []
        self._tested: list[tuple[str, int, str]] = []  # (file, line number, text): edits that failed the tests
        self._line: str | None = None  # the address of the last line that the agent looked at
        self._suspects: bytes | None = None  # what ``locate`` has left for the other tools
        self._in_step = True  # whether the driver knows every file: nothing but the tools has changed one

    def reset(self) -> tuple[str, str]:
        self._sandbox = self._sandbox or self._pool.take()
        self._tree = dict(self._original)
        self._history = []
        self._tested = []
        self._line = None
        self._suspects = None
        self._in_step = True
        self._sandbox.write({**self._files, **self._settings()})
        return SYSTEM_MESSAGE, self.task.problem_statement

    def step(self, command: str) -> Observation:
        sandbox = self._require_sandbox()
        argv = plain_words(command)
        if argv == ["submit"]:
            return Observation(text="submitted", done=True)
        if argv == ["undo"]:
            return Observation(text=self._undo())
        tool = argv[0] if argv and argv[0] in TOOLS else ""
        if tool == "locate" and self._history:  # line numbers of an edited tree would be wrong after undo
            return Observation(text=f"error: undo the edits first\n{self._status()}")
        known = self._answer(argv) if argv and tool else None
        result = known or (self._run_tool(argv) if argv and tool else sandbox.run(command))
        if tool not in READS_ONLY and not known:
            self._in_step = False
            self._note_changes()
        if tool in RUNS_TESTS and not result.output.startswith("PASS"):
            self._note_tested()
        if not tool:  # a shell command may have damaged what the tools need
            sandbox.write(self._settings())
        if tool == "locate":
            self._line = None
        elif argv and tool in TAKES_A_LINE and result.exit_code == 0:
            self._line = argv[1]
        text = truncate(_describe(result), OBSERVATION_CHARACTERS)
        shows_status = tool in ("view", "untested") and result.exit_code == 0 and not self._history
        return Observation(text=text if shows_status else f"{text}\n{self._status()}".lstrip())

    def _answer(self, argv: list[str]) -> CommandResult | None:
        """Return the result of a tool that the driver itself can run, without a process; None for any other."""
        if not self._in_step or argv[0] not in TAKES_A_LINE:
            return None
        state = {SUSPECTS_FILE: self._suspects, **self._settings()}
        files = KnownFiles(tree=self._tree, state=state)
        output = TruncatedOutput(self._require_sandbox().limits.output_bytes)
        try:
            code = line_tools.answer(
                line_tools.LineTools(files).commands,
                line_tools.__doc__ or "",
                argv[0],
                argv[1:],
                lambda line: output.add(f"{line}\n".encode(errors="replace")),
            )
        except Exception:  # an unknown file, or odd content: as it is in the sandbox
            return None
        if files.written and files.written.items() - self._tree.items():
            self._require_sandbox().write(files.written)
            self._history.append(self._tree)
            self._tree = {**self._tree, **files.written}
        return CommandResult(output=output.text(), exit_code=code)

    def _run_tool(self, argv: list[str]) -> CommandResult:
        """Run a repair tool; take a test run on a tree that was tested before from the memory."""
        sandbox = self._require_sandbox()
        if argv[0] not in RUNS_TESTS or len(argv) > 1:
            return sandbox.run(argv)
        key = (self.task_id, argv[0], self._tree_digest())
        known = self._memory.get(key) if self._memory is not None else None
        if known is None:
            result = sandbox.run(argv)
            written = sandbox.read(".repair").get(SUSPECTS_FILE) if argv[0] == "locate" else None
            if self._memory is not None and not result.timed_out:
                self._memory[key] = (result, written)
        else:
            result, written = known
            if written is not None:
                sandbox.write({SUSPECTS_FILE: written})
        self._suspects = written if argv[0] == "locate" else self._suspects
        return result

    def _tree_digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._tree):
            digest.update(f"{name}\0{len(self._tree[name])}\0".encode() + self._tree[name])
        return digest.hexdigest()

    def _settings(self) -> dict[str, bytes]:
        return {SETTINGS_FILE: json.dumps(self.task.tool_settings()).encode(), **self._tested_file()}

    def _tested_file(self) -> dict[str, bytes]:
        return {TESTED_FILE: json.dumps(self._tested).encode()}

    def _note_tested(self) -> None:
        """Record that the tests failed with the open edit, if it is the only one and changes one line.

        ``view`` then no longer proposes it.
        """
        if len(self._history) != 1:
            return
        (before,) = self._history
        changed = changed_files(before, self._tree)
        if len(changed) == 1:
            (name,) = changed
            old, new = (tree.get(name, b"").splitlines(keepends=True) for tree in (before, self._tree))
            lines = _changed_lines(old, new)
            if len(old) == len(new) and len(lines) == 1:
                self._tested.append((name, lines[0], new[lines[0] - 1].decode(errors="replace")))
                self._require_sandbox().write(self._tested_file())

    def _note_changes(self) -> None:
        files = self._require_sandbox().read(".")
        tree = {name: content for name, content in files.items() if not name.startswith(".repair/")}
        if tree != self._tree:
            self._history.append(self._tree)
            self._tree = tree

    def _undo(self) -> str:
        if not self._history:
            return f"error: nothing to undo\n{self._status()}"
        before, self._tree = self._tree, self._history.pop()
        changed = changed_files(before, self._tree)
        self._require_sandbox().write({name: self._tree.get(name) for name in changed})
        name = changed[0]
        lines = _changed_lines(*(tree.get(name, b"").splitlines() for tree in (before, self._tree)))
        self._line = f"{name}:{lines[0] if lines else 1}"
        return self._status()

    def _status(self) -> str:
        status = f"edits: {len(self._history)}"
        if self._history or self._line is None:
            return status
        argv = ["untested", self._line]
        return f"{status}\n{_describe(self._answer(argv) or self._require_sandbox().run(argv))}"


@dataclass(frozen=True, kw_only=True)
class KnownFiles:
    """The files of a sandbox as the driver knows them, for LineTools. ``written`` collects the changes of the tree."""

    tree: Tree
    state: Mapping[str, bytes | None]  # the tools' own files; None: there is none
    written: dict[str, bytes] = field(default_factory=dict)

    def read(self, path: str) -> bytes:
        """Return a file's content. Raises KeyError if the driver does not know the file."""
        content = self.state[path] if path in self.state else self.tree[path]
        if content is None:
            raise FileNotFoundError(path)
        return content

    def write(self, path: str, content: bytes) -> None:
        """Note a file of the tree as changed. Raises KeyError for any other."""
        if path not in self.tree:
            raise KeyError(path)
        self.written[path] = content


def plain_words(command: str) -> list[str] | None:
    """Return the arguments of a command that needs no shell; None if it needs one."""
    if not _PLAIN.fullmatch(_QUOTED.sub("", command)):
        return None
    try:
        return shlex.split(command)
    except ValueError:
        return None


def _changed_lines(before: Sequence[bytes], after: Sequence[bytes]) -> list[int]:
    """Return the numbers, from 1, of the lines that differ, up to the end of the shorter file."""
    return [number for number, (a, b) in enumerate(zip(before, after, strict=False), 1) if a != b]


def _describe(result: CommandResult) -> str:
    text = result.output.rstrip("\n")
    if result.timed_out:
        text = f"{text}\nerror: timed out".lstrip()
    elif result.exit_code != 0 and not text:
        text = f"error: exit code {result.exit_code}"
    return text
