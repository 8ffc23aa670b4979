"""The files that a patch changes are those that git itself names, whatever their names are."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dagger.envs.swe.patch import FileChange, changed_files, file_name
from megatron_dagger.envs.swe.rows import read_rows
from tests.support.git import commit_each, git
from tests.unit.envs.swe.rows import VERIFIED, needs_verified_rows

NAME = st.text(st.sampled_from("ab .-\"\\'é\t\n\x7f ☃"), min_size=1, max_size=6).filter(lambda name: name.strip("."))
PATH = st.lists(NAME, min_size=1, max_size=2).map("/".join)
CONTENT = st.sampled_from([b"", b"1\n2\n3\n4\n5\n", b"1\n2\n3\n4\n6\n", b"--- a/x\n+++ b/y\n@@ -1 +1 @@\n", b"\0\1"])


@pytest.mark.parametrize(
    "patch, expected",
    [
        ("diff --git a/x y b/x y\nold mode 100644\nnew mode 100755\n", FileChange("x y", "x y")),
        ("diff --git a/x b/x\nnew file mode 100644\nindex 0..e\n", FileChange("", "x")),
        ("diff --git a/x b/x\r\ndeleted file mode 100644\r\n--- a/x\r\n+++ /dev/null\r\n", FileChange("x", "")),
        ("diff --git a/x b/y\nsimilarity index 90%\nrename from x\nrename to y\n", FileChange("x", "y")),
        ("diff --git a/x b/y\nsimilarity index 90%\ncopy from x\ncopy to y\n--- a/x\n+++ b/y\n", FileChange("", "y")),
        (
            'diff --git "a/t\\303\\251" "b/t\\303\\251"\n--- "a/t\\303\\251"\n+++ "b/t\\303\\251"\n',
            FileChange("té", "té"),
        ),
        ("diff --git a/x b/x\nindex 0..1\nBinary files a/x and b/x differ\n", FileChange("x", "x", complete=False)),
        ("diff --git a/x b/x\nindex 0..1 100644\nGIT binary patch\nliteral 1\n", FileChange("x", "x")),
        ("diff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n--- a/other\n+++ b/other\n", FileChange("x", "x")),
    ],
)
def test_the_headers_of_one_file(patch, expected):
    assert changed_files(patch) == [expected]
    assert changed_files(f"a message\n{patch}{patch}") == [expected, expected]


def test_names_that_git_quotes():
    assert file_name('"a/\\056\\056/\\"\\\\\\n"') == 'a/../"\\\n'
    assert file_name('"\\351"').encode(errors="surrogateescape") == b"\xe9"
    assert file_name("a b\t") == "a b"


@settings(max_examples=40, deadline=None)
@given(
    before=st.dictionaries(PATH, CONTENT, max_size=4),
    after=st.dictionaries(PATH, CONTENT, max_size=4),
    options=st.lists(st.sampled_from(["-M", "-C", "--binary", "--no-renames"]), unique=True),
)
def test_the_changes_are_those_that_git_tells(tmp_path_factory, before, after, options):
    root = tmp_path_factory.mktemp("repository")
    commit_each(root, [before, after])
    patch = git(root, "diff", *options, "HEAD~", "HEAD").decode()
    changes = changed_files(patch)
    assert [(change.before, change.after) for change in changes] == told_by_git(root, options)
    assert all(change.complete for change in changes) is ("Binary files " not in patch)


def told_by_git(root, options):
    """Return the names of each changed file before and after the last commit, as git says without quotes."""
    fields = git(root, "diff", *options, "--name-status", "-z", "HEAD~", "HEAD").decode().split("\0")[:-1]
    names = []
    while fields:
        status, name = fields.pop(0), fields.pop(0)
        if status[0] in "RC":
            names.append((name if status[0] == "R" else "", fields.pop(0)))
        else:
            names.append(("" if status == "A" else name, "" if status == "D" else name))
    return names


@needs_verified_rows
def test_the_patches_of_real_rows_change_the_files_that_git_tells(tmp_path):
    for row in read_rows(str(VERIFIED)):
        for patch in (row["patch"], row["test_patch"]):
            listed = git(tmp_path, "apply", "--numstat", "-z", "-", input=patch.encode()).decode().split("\0")[:-1]
            assert [change.after or change.before for change in changed_files(patch)] == [
                line.split("\t")[2] for line in listed
            ]
