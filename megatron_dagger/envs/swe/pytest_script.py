"""Write eval scripts in SWE-bench 5.x's form, for data sets with pytest tests and no scripts of their own."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable

from megatron_dagger.envs.swe.patch import changed_files
from megatron_dagger.envs.swe.task import CONDA

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"


def eval_script(
    test_command: str, *, workdir: str, base_commit: str = "", test_patch: str = "", activate: str = CONDA
) -> str:
    """Return a script that applies ``test_patch``, runs the command between swebench's marks, and cleans up."""
    restore = _restore(test_patch, base_commit)
    lines = ["#!/bin/bash", "set -uxo pipefail", activate, f"cd {workdir}"]
    lines += ["git config --global --add safe.directory '*'", *restore]
    if test_patch:
        end = f"EOF_{hashlib.sha256(test_patch.encode()).hexdigest()[:12]}"
        lines += [f"git apply -v - <<'{end}'", test_patch.removesuffix("\n"), end]
    lines += [f": '{START}'", test_command, f": '{END}'", *restore]
    return "\n".join(lines) + "\n"


def quoted(arguments: Iterable[str]) -> str:
    """Return the arguments quoted for a shell, separated by blanks."""
    return " ".join(shlex.quote(argument) for argument in arguments)


def _restore(test_patch: str, base_commit: str) -> list[str]:
    """Return commands that bring the files of the test patch, whatever they are now, back to the base commit."""
    changes = changed_files(test_patch)
    if not changes:
        return []
    before = dict.fromkeys(change.before for change in changes if change.before)
    names = dict.fromkeys(name for change in changes for name in (change.before, change.after) if name)
    commands = [f"rm -rf -- {quoted(names)}"]
    return commands + ([f"git checkout {base_commit} -- {quoted(before)}"] if before else [])
