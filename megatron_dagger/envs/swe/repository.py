"""The repository in an agent's container: its history without the future, and the agent's changes.

Later commits, tags, other branches, the reflog, stashes, remotes and unreachable objects could reveal the repair. They
are not searched for: a new repository, with only what HEAD reaches, replaces the old one. The agent's starting state,
including the image's own uncommitted changes, is committed on top. If a setup patch adds the bug, this is the only
commit, because an earlier one would show the repair.

The agent and the project's tests may do anything to ``.git``: lock its index, change its settings, remove it. The
changes are therefore told by a copy of it elsewhere in the container. Repositories within the repository, submodules
among them, are plain files to it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from megatron_dagger.envs.swe.task import SweTask
from megatron_dagger.sandbox.base import EnvironmentBroken, FileSandbox

PREPARE_TIMEOUT_S = 600.0
PATCH_TIMEOUT_S = 120.0
MAX_PATCH_BYTES = 4 << 20
PATCH_FILE = "/tmp/patch.diff"
COPY = "/.sandbox/repository"  # of .git
BRANCH = "main"
_EXCLUDED = (".venv/", "__pycache__/", "*.pyc")
_GIT = (
    "git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c 'safe.directory=*'"
    " -c user.name=sandbox -c user.email=sandbox@localhost"
)
_PLAIN_FILES = "find . -mindepth 2 -name .git -prune -exec rm -rf -- {} +"

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
{_PLAIN_FILES}
{_GIT} add -A
{_GIT} diff --cached --quiet || {_GIT} commit -q -m 'The state at the start'
rm -rf .git/logs .git/ORIG_HEAD
"""
_ONLY_COMMIT = f"""
git update-ref HEAD "$({_GIT} commit-tree -m 'The state at the start' 'HEAD^{{tree}}')"
rm -rf .git/logs
git gc -q --prune=now
"""
# Objects, which git never changes, are linked if they can be
_COPY = """
rm -rf {copy}
mkdir -p {copy}
for part in .git/*; do [ "$part" = .git/objects ] || cp -a "$part" {copy}; done
cp -al .git/objects {copy} 2> /dev/null || {{ rm -rf {copy}/objects; cp -a .git/objects {copy}; }}
echo "base $(git rev-parse HEAD)"
"""
_DIFF = "--cached --binary --no-color --no-ext-diff --no-textconv --no-renames --src-prefix=a/ --dst-prefix=b/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """An agent's changes as a git patch (None: they cannot be told), and what it lacks and why ("": nothing)."""

    patch: str | None
    left_out: str = ""


def prepare(sandbox: FileSandbox, task: SweTask, *, copy: str = COPY) -> str:
    """Bring the image's repository to the agent's starting state; return that state's commit.

    Raises EnvironmentBroken if the image does not fit the task.
    """
    script = f"cd {shlex.quote(task.workdir)} {_FORGET}"
    if task.setup_patch:
        sandbox.write_file(PATCH_FILE, task.setup_patch.encode())
        script += f"git apply {PATCH_FILE}\nrm -f {PATCH_FILE}\n"
    if task.hidden:
        script += f"rm -rf -- {' '.join(map(shlex.quote, task.hidden))}\n"
    script += _COMMIT + (_ONLY_COMMIT if task.setup_patch else "") + _COPY.format(copy=shlex.quote(copy))
    result = sandbox.run(f"( {script} )", timeout_s=PREPARE_TIMEOUT_S)
    _, marker, base = result.output.rpartition("base ")
    if result.exit_code or not marker:
        raise EnvironmentBroken(f"{task.instance_id}: the repository cannot be prepared: {result.output[-500:]}")
    return base.strip()


def changes(sandbox: FileSandbox, task: SweTask, base: str, *, copy: str = COPY) -> Changes:
    """Return the agent's changes since the commit ``base``, whatever it did to ``.git``."""
    script = _changes_script(shlex.quote(task.workdir), shlex.quote(copy), base)
    result = sandbox.run(f'env -i PATH="$PATH" bash -c {shlex.quote(script)}', timeout_s=PATCH_TIMEOUT_S)
    problems = result.output.strip()[-500:]
    if result.timed_out:
        return Changes(patch=None, left_out=f"git took more than {PATCH_TIMEOUT_S:.0f} s")
    if result.exit_code:
        return Changes(patch=None, left_out=problems or f"git ended with {result.exit_code}")
    try:
        content = sandbox.read_file(f"{copy}/patch.diff", limit=MAX_PATCH_BYTES + 1)
    except OSError as error:
        return Changes(patch=None, left_out=f"the patch: {error}")
    if len(content) > MAX_PATCH_BYTES:
        return Changes(patch=None, left_out=f"the patch is larger than {MAX_PATCH_BYTES >> 20} MiB")
    return Changes(patch=content.decode(errors="surrogateescape"), left_out=problems)


def _changes_script(workdir: str, copy: str, base: str) -> str:
    """Return the bash script that writes the patch to ``copy``/patch.diff; the paths are quoted.

    It has none of the agent's variables, functions and settings, and no index with the times of files: git would miss
    an edit within a second that keeps the size. It prints the errors of files that git cannot read.
    """
    return f"""
cd {workdir} || exit 1
export LC_ALL=C HOME=/nonexistent GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null
export GIT_DIR={copy} GIT_WORK_TREE="$PWD" GIT_INDEX_FILE={copy}/index.now
chmod -R u+rwX . 2> /dev/null
{_PLAIN_FILES}
rm -f {copy}/index.now
{_GIT} read-tree {base} || exit 1
{_GIT} add -A --ignore-errors . 2> {copy}/problems
{_GIT} diff {_DIFF} {base} > {copy}/patch.diff || exit 1
grep ^error: {copy}/problems
exit 0
"""
