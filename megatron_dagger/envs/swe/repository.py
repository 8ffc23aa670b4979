"""The repository in an agent's container: its history without the future, and the agent's changes.

Later commits, tags, other branches, the reflog, stashes, remotes and unreachable objects could reveal the repair. They
are not searched for: a new repository, with only what HEAD reaches, replaces the old one. The agent's starting state,
including the image's own uncommitted changes, is committed on top. If a setup patch adds the bug, this is the only
commit, because an earlier one would show the repair.
"""

from __future__ import annotations

import shlex

from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.base import EnvironmentBroken, FileSandbox

PREPARE_TIMEOUT_S = 600.0
PATCH_TIMEOUT_S = 120.0
MAX_PATCH_BYTES = 4 << 20
PATCH_FILE = "/tmp/patch.diff"
BRANCH = "main"
_EXCLUDED = (".venv/", "__pycache__/", "*.pyc")
_GIT = "git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c user.name=sandbox -c user.email=sandbox@localhost"

_FORGET = f"""
set -e
git config --global --add safe.directory '*'
fresh=$(mktemp -d)
git init -q --bare "$fresh"
git -C "$fresh" fetch -q --no-tags --update-shallow "$PWD" HEAD:refs/heads/{BRANCH}
rm -f "$fresh/FETCH_HEAD"
git -C "$fresh" symbolic-ref HEAD refs/heads/{BRANCH}
git -C "$fresh" config core.bare false
mv "$(git rev-parse --git-dir)/index" "$fresh/index"
mkdir -p "$fresh/info"
rm -rf .git
mv "$fresh" .git
printf '%s\\n' {" ".join(shlex.quote(name) for name in _EXCLUDED)} >> .git/info/exclude
git reset -q
"""
_COMMIT = f"""
{_GIT} add -A
{_GIT} diff --cached --quiet || {_GIT} commit -q -m 'The state at the start'
rm -rf .git/logs .git/ORIG_HEAD
"""
_ONLY_COMMIT = f"""
git update-ref HEAD "$({_GIT} commit-tree -m 'The state at the start' 'HEAD^{{tree}}')"
rm -rf .git/logs
git gc -q --prune=now
"""
_BASE = 'echo "base $(git rev-parse HEAD)"'


def prepare(sandbox: FileSandbox, task: SweTask) -> str:
    """Bring the image's repository to the agent's starting state; return that state's commit.

    Raises EnvironmentBroken if the image does not fit the task.
    """
    script = f"cd {shlex.quote(task.workdir)} {_FORGET}"
    if task.setup_patch:
        sandbox.write_file(PATCH_FILE, task.setup_patch.encode())
        script += f"git apply {PATCH_FILE}\nrm -f {PATCH_FILE}\n"
    if task.hidden:
        script += f"rm -rf -- {' '.join(map(shlex.quote, task.hidden))}\n"
    script += _COMMIT + (_ONLY_COMMIT if task.setup_patch else "") + _BASE
    result = sandbox.run(f"( {script} )", timeout_s=PREPARE_TIMEOUT_S)
    _, marker, base = result.output.rpartition("base ")
    if result.exit_code or not marker:
        raise EnvironmentBroken(f"{task.instance_id}: the repository cannot be prepared: {result.output[-500:]}")
    return base.strip()


def changes(sandbox: FileSandbox, task: SweTask, base: str) -> str | None:
    """Return the agent's changes since the commit ``base`` as a git patch.

    None if git fails (the agent may have damaged the repository) or the patch exceeds MAX_PATCH_BYTES.
    """
    workdir = shlex.quote(task.workdir)
    flags = "--cached --binary --no-color --no-ext-diff --no-textconv --no-renames --src-prefix=a/ --dst-prefix=b/"
    command = f"( cd {workdir} && {_GIT} add -A && {_GIT} diff {flags} {base} > {PATCH_FILE} )"
    result = sandbox.run(command, timeout_s=PATCH_TIMEOUT_S)
    if result.exit_code:
        return None
    try:
        content = sandbox.read_file(PATCH_FILE, limit=MAX_PATCH_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    if len(content) > MAX_PATCH_BYTES:
        return None
    return content.decode(errors="surrogateescape")
