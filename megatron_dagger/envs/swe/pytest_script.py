"""Write eval scripts in SWE-bench 5.x's form, for data sets with pytest tests and no scripts of their own."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence

from megatron_dagger.envs.swe.task import CONDA

START, END = ">>>>> Start Test Output", ">>>>> End Test Output"
_FILE = re.compile(r"^diff --git a/(.*) b/(.*)$", re.MULTILINE)


def eval_script(
    test_command: str, *, workdir: str, base_commit: str = "", test_patch: str = "", activate: str = CONDA
) -> str:
    """Return a script that applies ``test_patch``, runs the command between swebench's marks, and cleans up."""
    restore = _restore(test_patch, base_commit)
    lines = ["#!/bin/bash", "set -uxo pipefail", activate, f"cd {workdir}"]
    lines += ["git config --global --add safe.directory '*'", *restore]
    if test_patch:
        end = f"EOF_{hashlib.sha256(test_patch.encode()).hexdigest()[:12]}"
        lines += [f"git apply -v - <<'{end}'", test_patch.rstrip("\n"), end]
    lines += [f": '{START}'", test_command, f": '{END}'", *restore]
    return "\n".join(lines) + "\n"


def patched_files(patch: str) -> list[str]:
    """Return the names of the files that a patch touches, as they are after it."""
    return list(dict.fromkeys(match[2] for match in _FILE.finditer(patch)))


def quoted(arguments: Sequence[str]) -> str:
    """Return the arguments quoted for a shell, separated by blanks."""
    return " ".join(shlex.quote(argument) for argument in arguments)


def _restore(test_patch: str, base_commit: str) -> list[str]:
    """Return commands that reset the files of the test patch to the base commit and remove those it adds."""
    if not test_patch:
        return []
    parts = re.split(r"^(?=diff --git )", test_patch, flags=re.MULTILINE)
    added = [name for part in parts if "\nnew file mode" in part for name in patched_files(part)]
    changed = [name for name in patched_files(test_patch) if name not in added]
    commands = [f"rm -f -- {quoted(added)}"] if added else []
    return commands + ([f"git checkout {base_commit} -- {quoted(changed)}"] if changed else [])
