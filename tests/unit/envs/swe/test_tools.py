"""The editor: what it cannot do is an answer that says why, and it keeps a file's own line ends."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dagger.envs.swe.tools import Editor
from megatron_dagger.sandbox.base import SandboxLimits
from megatron_dagger.sandbox.local import ProcessSandbox


@pytest.fixture(scope="module")
def sandbox():
    with ProcessSandbox(SandboxLimits()) as opened:
        yield opened


@pytest.fixture
def root(sandbox):
    sandbox.reset()
    return sandbox.run("pwd").output.strip()


def edit(sandbox, command, path, **arguments):
    return Editor(sandbox).answer({"command": command, "path": path, **arguments})


@pytest.mark.parametrize(
    "path, reason",
    [
        ("{root}/file/below.py", "Not a directory"),
        ("{root}/" + "n" * 300, "File name too long"),
        ("{root}/circle", "Too many levels of symbolic links"),
        ("/dev/full", "it is not a regular file"),
        ("/proc/none.py", "."),
        ("{root}", "is a directory"),
        ("relative.py", "is no absolute path"),
        ("/line\nfeed", "is no absolute path"),
        ("/nul\0", "is no absolute path"),
        ("", "is no absolute path"),
    ],
)
def test_what_cannot_be_written_is_an_answer_with_the_reason(sandbox, root, path, reason):
    sandbox.run("echo x > file; ln -s circle circle")
    path = path.format(root=root)
    answer = edit(sandbox, "create", path, file_text="x" * 9000)
    assert answer.startswith("error: ")
    assert reason in answer
    assert edit(sandbox, "view", f"{root}/file") == "     1\tx"


CRLF = b"one\r\ntwo\r\nthree\n"


@pytest.mark.parametrize(
    "arguments, content",
    [
        ({"command": "str_replace", "old_str": "one\ntwo\n", "new_str": "1\n2\n"}, b"1\r\n2\r\nthree\n"),
        ({"command": "str_replace", "old_str": "two\r\n", "new_str": "2\n"}, b"one\r\n2\nthree\n"),
        ({"command": "str_replace", "old_str": "three\n", "new_str": "3\n"}, b"one\r\ntwo\r\n3\n"),
        ({"command": "insert", "insert_line": 1, "new_str": "half\nway"}, b"one\r\nhalf\r\nway\r\ntwo\r\nthree\n"),
        ({"command": "insert", "insert_line": 0, "new_str": "zero"}, b"zero\r\none\r\ntwo\r\nthree\n"),
        ({"command": "insert", "insert_line": 3, "new_str": "four\n"}, b"one\r\ntwo\r\nthree\nfour\n"),
    ],
)
def test_edits_keep_a_files_own_line_ends(sandbox, root, arguments, content):
    path = f"{root}/a.txt"
    sandbox.write_file(path, CRLF)
    assert edit(sandbox, "view", path) == "     1\tone\n     2\ttwo\n     3\tthree"
    edit(sandbox, path=path, **arguments)
    assert sandbox.read_file(path) == content


def test_lines_are_those_of_git_and_grep(sandbox, root):
    path = f"{root}/a.py"
    sandbox.write_file(path, "a = 1\n\x0c\nb = '\u2028\x1c'\nc = 3\n".encode())
    number = int(sandbox.run("grep -n c.= a.py").output.split(":")[0])
    assert edit(sandbox, "view", path, view_range=[number, number]) == "     4\tc = 3"
    edit(sandbox, "insert", path, insert_line=3, new_str="new")
    assert sandbox.run("sed -n 4p a.py").output == "new\n"


TEXT = st.text(st.sampled_from("ab \n\r\x0c\u2028\x00é😀"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT, new=TEXT, number=st.integers(0, 5))
def test_no_line_is_changed_but_those_meant(sandbox, root, text, new, number):
    path = f"{root}/any"
    sandbox.write_file(path, text.encode())
    answer = edit(sandbox, "insert", path, insert_line=number, new_str=new)
    content = sandbox.read_file(path).decode()
    lines = text.split("\n")
    if answer.startswith("error:"):
        assert content == text
    else:
        before, after = "\n".join(lines[:number]), "\n".join(lines[number:])
        assert content.startswith(before)
        assert content.endswith(after)
