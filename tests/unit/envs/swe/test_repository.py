"""The agent's changes are told whatever it did to git, and the reason names what is left out."""

import dataclasses

import pytest

from megatron_dagger.envs.swe.repository import MAX_PATCH_BYTES, changes, prepare
from megatron_dagger.envs.swe.swebench import swebench_task
from megatron_dagger.sandbox.base import SandboxLimits
from megatron_dagger.sandbox.local import ProcessSandbox
from tests.unit.envs.swe.rows import BENCH

COMMIT = "git -c user.name=a -c user.email=a@b commit -q"
LIMITS = SandboxLimits(timeout_s=60, disk_mib=64, memory_mib=4096)


@pytest.fixture(scope="module")
def sandbox():
    with ProcessSandbox(LIMITS) as opened:
        yield opened


@pytest.fixture
def repository(sandbox, tmp_path):
    """Return the task, the commit at its start, and the folder of the copy; the repository has one file."""
    sandbox.reset()
    root = sandbox.run("pwd").output.strip()
    task = dataclasses.replace(swebench_task(BENCH), workdir=root)
    sandbox.run(f"git init -q; echo 'x = 1' > a.py; git add .; {COMMIT} -m 1")
    copy = f"{tmp_path}/copy of git"
    return task, prepare(sandbox, task, copy=copy), copy


@pytest.mark.parametrize(
    "deed, also",
    [
        ("true", ""),
        ("git init -q scratch", ""),
        ("git init -q scratch; touch scratch/x", "scratch/x"),
        (f"git init -q c; cd c; echo 1 > y; git add y; {COMMIT} -m x", "c/y"),
        (f"git init -q c; cd c; {COMMIT} --allow-empty -m x", ""),
        (f"git init -q c; (cd c; echo 1 > y; git add y; {COMMIT} -m x); git add c; {COMMIT} -m sub", "c/y"),
        (": > .git/index.lock", ""),
        ("rm -rf .git", ""),
        ("rm -rf .git; git init -q", ""),
        ("echo damaged > .git/index; echo damaged > .git/HEAD", ""),
        (f"git add -A; {COMMIT} -m mine; git gc -q --prune=now", ""),
        ("git checkout -q --orphan other; git rm -q --cached a.py", ""),
        (
            "git config core.worktree /nowhere; git config core.autocrlf true; git config core.excludesFile /dev/zero",
            "",
        ),
        ("echo '*' > .git/info/exclude; echo 1 > new.py", "new.py"),
        ("touch s; chmod 000 s", "s"),
        ("mkdir d; echo 1 > d/e; chmod 000 d/e d", "d/e"),
        ("mkfifo pipe; ln -s circle circle", "circle"),
        ("printf '1' > \"$(printf 'line\\nfeed \\303\\251 \\\\ quote\\042')\"", "line"),
    ],
)
def test_the_changes_are_told_whatever_the_agent_did_to_git(sandbox, repository, deed, also):
    task, base, copy = repository
    sandbox.run(f"echo 'x = 2' > a.py; {deed}")
    result = changes(sandbox, task, base, copy=copy)
    assert result.patch is not None, result.left_out
    assert "-x = 1\n+x = 2\n" in result.patch
    assert also in result.patch
    assert "Subproject" not in result.patch
    assert result.left_out == ""


def test_bytes_that_are_no_text_come_through(sandbox, repository):
    task, base, copy = repository
    sandbox.run("printf 'caf\\351\\n' > latin.py")
    assert b"+caf\xe9\n" in (changes(sandbox, task, base, copy=copy).patch or "").encode(errors="surrogateescape")


def test_nothing_changed_is_an_empty_patch(sandbox, repository):
    task, base, copy = repository
    assert changes(sandbox, task, base, copy=copy).patch == ""


@pytest.mark.parametrize(
    "deed, reason",
    [
        (f"head -c {MAX_PATCH_BYTES + 1} /dev/urandom > big", "larger than 4 MiB"),
        ('rm -rf "{copy}"', "No such file|not a git repository"),
    ],
)
def test_changes_that_cannot_be_told_have_the_reason(sandbox, repository, deed, reason):
    task, base, copy = repository
    sandbox.run(deed.format(copy=copy))
    result = changes(sandbox, task, base, copy=copy)
    assert result.patch is None
    assert any(part in result.left_out for part in reason.split("|"))


def test_repositories_of_the_image_within_the_repository_are_plain_files(sandbox, tmp_path):
    sandbox.reset()
    root = sandbox.run("pwd").output.strip()
    task = dataclasses.replace(swebench_task(BENCH), workdir=root)
    sandbox.run(f"git init -q; echo 1 > a.py; git add .; {COMMIT} -m 1; mkdir sub; echo 'gitdir: ../gone' > sub/.git")
    sandbox.run("echo 1 > sub/b.py")
    copy = str(tmp_path / "copy")
    base = prepare(sandbox, task, copy=copy)
    sandbox.run("echo 2 > sub/b.py")
    assert "a/sub/b.py" in (changes(sandbox, task, base, copy=copy).patch or "")
