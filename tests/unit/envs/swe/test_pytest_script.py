"""Scripts run in real repositories: the row's own test files are run, whatever the agent did to theirs."""

import subprocess

import pytest

from megatron_dagger.envs.swe.pytest_script import END, START, eval_script
from tests.support.git import ENVIRONMENT, commit_each, git

BEFORE = {
    "tests/test_a.py": "1\n",
    "tests/old.py": "a long line that stays\nanother one\nand a third\n1\n",
    "tests/gone.py": "1\n",
    "tests/té.py": "1\n",
    "tests/page.py": "one\f1\nlast\n",
}
AFTER = {
    "tests/test_a.py": "2\n",
    "tests/new.py": "a long line that stays\nanother one\nand a third\n2\n",
    "tests/added.py": "3\n",
    "tests/empty.py": "",
    "tests/té.py": "2\n",
    "tests/page.py": "one\f2\nlast\n",
    "tests/picture.png": "\0\1",
}


@pytest.fixture(scope="module")
def repository_and_patch(tmp_path_factory):
    """A repository, its first commit, and the patch to the tests of the second."""
    root = tmp_path_factory.mktemp("repository")
    commit_each(root, [{name: text.encode() for name, text in files.items()} for files in (BEFORE, AFTER)])
    patch = git(root, "diff", "-M", "--binary", "HEAD~", "HEAD").decode()
    return root, git(root, "rev-parse", "HEAD~").decode().strip(), patch


@pytest.mark.parametrize(
    "deed",
    [
        "true",
        "for name in tests/*; do echo mine > $name; done; git add -A; git commit -qm mine",
        "rm -rf tests; git add -A; git commit -qm mine",
        "rm -rf tests; echo 1 > tests",
        "rm -rf tests; ln -s /tmp tests",
        "echo 1 > tests/new.py; echo 1 > tests/added.py; echo 1 > tests/picture.png; git add -A; git commit -qm mine",
        "rm tests/test_a.py; mkdir -p tests/test_a.py/x tests/added.py; touch tests/added.py/y",
        "git mv tests/old.py tests/new.py",
        "ln -sf /dev/null tests/empty.py; ln -sf nowhere tests/new.py",
    ],
)
def test_the_rows_own_tests_are_run_whatever_the_agent_did(tmp_path, repository_and_patch, deed):
    origin, base, patch = repository_and_patch
    repository, seen = tmp_path / "repository", tmp_path / "seen"
    git(tmp_path, "clone", "-q", origin, repository)
    git(repository, "reset", "-q", "--hard", base)
    subprocess.run(["bash", "-c", deed], cwd=repository, env=ENVIRONMENT, check=True)
    script = eval_script(
        f"cp -r tests {seen}", workdir=str(repository), base_commit=base, test_patch=patch, activate="true"
    )
    environment = {**ENVIRONMENT, "GIT_CONFIG_GLOBAL": str(tmp_path / "config")}  # in which the script writes
    log = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True).stderr
    assert [log.count(f": '{mark}'") for mark in (START, END)] == [1, 1]
    present = {f"tests/{path.name}": path.read_text() for path in seen.iterdir()}
    assert {name: present.get(name) for name in AFTER} == AFTER, log
    assert "tests/old.py" not in present
    assert "tests/gone.py" not in present
    for name, text in BEFORE.items():  # and afterwards the files are as before the patch
        assert (repository / name).read_text() == text
    assert not (repository / "tests" / "added.py").exists()
