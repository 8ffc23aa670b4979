"""What both kinds of repair share: a sandbox for the episode, the judge, and the patch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from megatron_dagger.envs.base import Env
from megatron_dagger.envs.repo_repair.task import RepairTask
from megatron_dagger.envs.repo_repair.testing import run_tests
from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.local import ProcessSandbox, SandboxPool

Tree = Mapping[str, bytes]


class RepairEpisode(Env):
    """An Env of one RepairTask; ``files`` are its repository, ``.git`` included."""

    def __init__(self, task: RepairTask, files: Tree, pool: SandboxPool):
        self.task_id = task.instance_id
        self.task = task
        self._files = files
        self._original = {name: content for name, content in files.items() if not name.startswith(".git/")}
        self._pool = pool
        self._sandbox: ProcessSandbox | None = None
        self._tree: dict[str, bytes] = {}  # the work tree as last read

    def judge(self) -> bool:
        submitted = self._submitted()
        self.close()  # so that the judge need not wait for another sandbox to start
        return run_tests(self._pool, submitted, self.task.tool_settings()).passed(self.task.tests)

    def report(self) -> dict[str, object]:
        """Return the patch."""
        return {"patch": self.patch()}

    def patch(self) -> str:
        """Return the agent's changes of the package as a unified diff."""
        return tree_diff(self._original, self._submitted())

    def close(self) -> None:
        """Give the sandbox back to the pool, which empties it. May be called twice."""
        sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            self._pool.give(sandbox)

    def _require_sandbox(self) -> ProcessSandbox:
        if self._sandbox is None:
            raise EnvironmentBroken("the episode has not been reset, or is closed")
        return self._sandbox

    def _submitted(self) -> dict[str, bytes]:
        """Return the task's files with the agent's version of the modules under repair; changed tests do not count."""
        package = {name: self._tree[name] for name in self.task.source_files if name in self._tree}
        return {**self._original, **package}


def tree_diff(before: Tree, after: Tree) -> str:
    """Return a unified diff in git's form between two trees of text files."""
    parts = []
    for name in changed_files(before, after):
        old, new = (tree.get(name, b"").decode(errors="replace").splitlines(keepends=True) for tree in (before, after))
        lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
        parts.append(f"diff --git a/{name} b/{name}\n" + "".join(lines))
    return "".join(parts)


def changed_files(before: Tree, after: Tree) -> list[str]:
    """Return the names of the files that differ or are in one tree only, sorted."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
