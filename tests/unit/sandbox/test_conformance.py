"""The FileSandbox contract, for every engine, with hostile commands."""

import os
import threading
import time

import pytest

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.types import StopReason
from tests.unit.sandbox.conftest import MEMORY_IS_SHARED
from tools.support.docker_engine import processes_with


def test_runs_commands_on_written_files(sandbox):
    sandbox.write({"a/b.txt": b"hello\n"})
    result = sandbox.run("cat a/b.txt; echo oops >&2; exit 3")
    assert (result.output, result.exit_code, result.timed_out) == ("hello\noops\n", 3, False)
    sandbox.run("echo more >> a/b.txt; mkdir c; echo x > c/d")
    assert sandbox.read() == {"a/b.txt": b"hello\nmore\n", "c/d": b"x\n"}


@pytest.mark.parametrize(
    "command, output",
    [
        ("echo a\0b", "ab\n"),
        ("\0", ""),
        ("echo '\ud83d'", "?\n"),
        ("printf '%s' 'a\u2028\x0c\x1b'", "a\u2028\x0c\x1b"),
        ("echo é", "é\n"),
        (f"echo {'x' * 200_000} | wc -c", "200001\n"),
    ],
)
def test_any_text_is_a_command(sandbox, command, output):
    assert sandbox.run(command).output == output
    assert sandbox.run("echo alive").output == "alive\n"


def test_a_name_that_is_no_text_is_that_file(sandbox):
    sandbox.run("printf x > \"$(printf 'a\\351.txt')\"")
    sandbox.write_file("a\udce9.txt", b"other")
    assert sandbox.read_file("a\udce9.txt") == b"other"
    assert sandbox.run("ls a*.txt | wc -l; rm a*.txt").output.strip() == "1"


def test_a_timeout_kills_every_process_of_the_command(sandbox):
    duration = f"31{os.getpid()}"
    started = time.monotonic()
    result = sandbox.run(f"echo begun; sleep {duration} & sleep {duration}", timeout_s=1)
    assert result.timed_out
    assert result.output == "begun\n"
    assert time.monotonic() - started < 4
    assert not processes_with(f"sleep {duration}")
    assert sandbox.run("echo alive").output == "alive\n"


def test_background_process_does_not_outlive_its_command(sandbox):
    duration = f"32{os.getpid()}"
    assert sandbox.run(f"sleep {duration} & echo started").output == "started\n"
    assert not processes_with(f"sleep {duration}")


def test_output_is_truncated_in_the_middle(sandbox):
    output = sandbox.run("echo first; yes | head -c 100000; echo last").output
    assert output.startswith("first\n")
    assert output.endswith("last\n")
    assert "bytes cut" in output
    assert len(output) < 2100
    assert "bytes cut" not in sandbox.run("yes | head -c 3000", output_bytes=4000).output


def test_memory_is_limited(sandbox, engine):
    greedy = "python3 -c 'x = bytearray(900 << 20); print(len(x))'"
    if engine in MEMORY_IS_SHARED:
        with pytest.raises(EnvironmentBroken, match="400 MiB") as broken:
            sandbox.run(greedy)
        assert broken.value.reason is StopReason.OUT_OF_MEMORY
        return
    result = sandbox.run(greedy)
    assert result.exit_code != 0
    assert "MemoryError" in result.output


def test_links_are_not_followed(sandbox):
    sandbox.run("ln -s /etc/passwd stolen; ln -s /tmp away")
    assert sandbox.read() == {}
    with pytest.raises(EnvironmentBroken, match="leads out"):
        sandbox.write({"../escaped": b"x"})
    with pytest.raises(EnvironmentBroken, match="leads out"):
        sandbox.write({"away/escaped": b"x"})


def test_any_file_is_read_and_written(sandbox):
    root = sandbox.run("pwd").output.strip()
    note = f"{root}/deep/er/a note.txt"
    sandbox.write_file(note, b"one\ntwo\x00\xff")
    assert sandbox.read_file(note) == b"one\ntwo\x00\xff"
    assert sandbox.read_file("deep/er/a note.txt", limit=3) == b"one"
    assert sandbox.read() == {"deep/er/a note.txt": b"one\ntwo\x00\xff"}
    assert sandbox.read_file("/proc/version").startswith(b"Linux")
    with pytest.raises(FileNotFoundError):
        sandbox.read_file(f"{root}/nothing")
    with pytest.raises(IsADirectoryError):
        sandbox.read_file(root)
    with pytest.raises(IsADirectoryError):
        sandbox.write_file(root, b"")


@pytest.mark.parametrize(
    "path, reading, writing",
    [
        ("file/below", "Not a directory|does not exist", "Not a directory"),
        ("file/far/below", "Not a directory|does not exist", "Not a directory"),
        ("n" * 300, "File name too long", "File name too long"),
        ("circle", "Too many levels", "Too many levels"),
        ("closed", "Permission denied", "Permission denied"),
        ("shut/file", "Permission denied|does not exist", "Permission denied"),
        ("fifo", "not a regular file", "not a regular file"),
        ("/dev/full", "not a regular file", "not a regular file"),
        ("/proc/none.py", "does not exist", "No such file|nonexistent|Permission denied|Read-only"),
        ("dangling", "does not exist", None),
        (" leading and trailing ", "does not exist", None),
        ("back\\slash '\"$(touch pwned)`", "does not exist", None),
        ("\u00e9\u4e2d", "does not exist", None),
        ("-n", "does not exist", None),
    ],
)
def test_what_the_file_system_refuses_is_an_error_with_the_reason_and_the_sandbox_lives(
    sandbox, engine, path, reading, writing
):
    if engine == "process" and os.geteuid() == 0 and "Permission denied" in reading:
        pytest.skip("this engine runs commands as the tests' own user, to whom no file is closed")
    sandbox.run("echo x > file; ln -s circle circle; echo x > closed; chmod 000 closed; mkdir shut; chmod 000 shut")
    sandbox.run("python3 -c 'import os; os.mkfifo(\"fifo\")'; ln -s nowhere dangling")
    with pytest.raises(OSError, match=reading):
        sandbox.read_file(path)
    if writing is None:
        sandbox.write_file(path, b"content")
        assert sandbox.read_file(path) == b"content"
    else:
        with pytest.raises(OSError, match=writing):
            sandbox.write_file(path, b"content" * 2000)
    assert sandbox.run("cat file; ls pwned 2> /dev/null").output == "x\n"


def test_files_are_put_in_place_whatever_is_there(sandbox):
    """What is judged is read and written after the agent's last command, which may have left anything."""
    sandbox.run("mkdir -p taken/deep; echo x > way; ln -s loop loop; mkdir -p closed/in; echo x > closed/in/a")
    sandbox.run("ln -s /nowhere link; echo s > secret; chmod 000 secret; chmod 000 closed/in; chmod 500 closed")
    sandbox.write(dict.fromkeys(("taken", "way/on", "loop/b", "closed/in/b", "closed/c", "link", "gone"), b"new"))
    sandbox.write({"gone": None, "never": None})
    files = sandbox.read()
    assert files == {
        **dict.fromkeys(("taken", "way/on", "loop/b", "closed/in/b", "closed/c", "link"), b"new"),
        "closed/in/a": b"x\n",
        "secret": b"s\n",
    }


def test_reset_leaves_nothing(sandbox):
    sandbox.run("mkdir -p a/b; touch a/b/c .hidden")
    sandbox.reset()
    assert sandbox.run("ls -A").output == ""


def test_a_closed_sandbox_is_an_error(sandbox):
    sandbox.close()
    with pytest.raises(EnvironmentBroken, match="closed"):
        sandbox.run("true")


def test_closing_while_a_command_runs_ends_both(sandbox):
    finished = []

    def command():
        with pytest.raises(EnvironmentBroken):
            sandbox.run("sleep 60", timeout_s=60)
        finished.append(time.monotonic())

    thread = threading.Thread(target=command)
    thread.start()
    time.sleep(0.5)
    with pytest.raises(EnvironmentBroken, match="busy"):
        sandbox.reset()
    sandbox.close()
    thread.join(timeout=10)
    assert finished
