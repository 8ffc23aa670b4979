"""The Sandbox contract, for every implementation, with hostile commands."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.sandbox import (
    BubblewrapSandbox,
    ProcessSandbox,
    SandboxLimits,
    SandboxPool,
    bubblewrap_works,
)
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.sandbox.local.process import HOME_PREFIX
from megatron_dagger.types import StopReason
from tools.support.docker_engine import IMAGE, processes_with

LIMITS = SandboxLimits(timeout_s=5, memory_mib=400, disk_mib=16, processes=24, output_bytes=2000)
DOCKER_LIMITS = DockerLimits(timeout_s=5, memory_mib=400, disk_mib=64, processes=24, output_bytes=2000)
isolated = pytest.param(
    BubblewrapSandbox, marks=pytest.mark.skipif(not bubblewrap_works(), reason="bubblewrap does not work here")
)


@pytest.fixture(params=[isolated, ProcessSandbox, DockerSandbox])
def sandbox(request):
    if request.param is DockerSandbox:
        made = DockerSandbox(request.getfixturevalue("docker_host"), IMAGE, DOCKER_LIMITS, root="/work")
    else:
        made = request.param(LIMITS)
    with made:
        yield made


@pytest.fixture
def bubblewrap():
    if not bubblewrap_works():
        pytest.skip("bubblewrap does not work here")
    with BubblewrapSandbox(LIMITS) as made:
        yield made


def test_runs_commands_on_written_files(sandbox):
    sandbox.write({"a/b.txt": b"hello\n"})
    result = sandbox.run("cat a/b.txt; echo oops >&2; exit 3")
    assert (result.output, result.exit_code, result.timed_out) == ("hello\noops\n", 3, False)
    sandbox.run("echo more >> a/b.txt; mkdir c; echo x > c/d")
    assert sandbox.read() == {"a/b.txt": b"hello\nmore\n", "c/d": b"x\n"}


def test_timeout_kills_all_it_started(sandbox):
    word = f"31{os.getpid()}"
    started = time.monotonic()
    result = sandbox.run(f"echo begun; sleep {word} & sleep {word}", timeout_s=1)
    assert result.timed_out
    assert result.output == "begun\n"
    assert time.monotonic() - started < 4
    assert not processes_with(f"sleep {word}")
    assert sandbox.run("echo alive").output == "alive\n"


def test_background_process_does_not_outlive_its_command(sandbox):
    word = f"32{os.getpid()}"
    assert sandbox.run(f"sleep {word} & echo started").output == "started\n"
    assert not processes_with(f"sleep {word}")


def test_output_is_clipped_in_the_middle(sandbox):
    output = sandbox.run("echo first; yes | head -c 100000; echo last").output
    assert output.startswith("first\n")
    assert output.endswith("last\n")
    assert "bytes cut" in output
    assert len(output) < 2100


def test_memory_is_limited(sandbox):
    greedy = "python3 -c 'x = bytearray(900 << 20); print(len(x))'"
    if isinstance(sandbox, DockerSandbox):  # its limit is the container's, not each process's
        with pytest.raises(EnvironmentBroken, match="400 MiB") as broken:
            sandbox.run(greedy)
        assert broken.value.reason is StopReason.OUT_OF_MEMORY
        return
    result = sandbox.run(greedy)
    assert result.exit_code != 0
    assert "MemoryError" in result.output


def test_links_lead_nowhere(sandbox):
    sandbox.run("ln -s /etc/passwd stolen; ln -s /tmp away")
    assert sandbox.read() == {}
    with pytest.raises(EnvironmentBroken, match="leads out"):
        sandbox.write({"../escaped": b"x"})
    with pytest.raises(EnvironmentBroken, match="leads out"):
        sandbox.write({"away/escaped": b"x"})


def test_reset_leaves_nothing(sandbox):
    sandbox.run("mkdir -p a/b; touch a/b/c .hidden")
    sandbox.reset()
    assert sandbox.run("ls -A").output == ""


def test_closed_sandbox_says_so(sandbox):
    sandbox.close()
    with pytest.raises(EnvironmentBroken, match="closed"):
        sandbox.run("true")


def test_isolation(bubblewrap, tmp_path):
    (tmp_path / "secret").write_text("of the host")
    assert "root" not in bubblewrap.run("whoami 2>&1; id -un 2>&1").output.split()
    for secret in ("/etc/shadow", __file__, tmp_path / "secret"):
        assert bubblewrap.run(f"cat {secret}").exit_code != 0, secret
    assert bubblewrap.run("touch /usr/here").exit_code != 0
    with socket.create_server(("127.0.0.1", 0)) as server:
        network = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert subprocess.run([sys.executable, "-c", network], check=False).returncode == 0  # it listens
        assert bubblewrap.run(f'python3 -c "{network}"').exit_code != 0
    assert bubblewrap.run("tail -n +3 /proc/net/dev | grep -v lo:").output == ""
    assert len(bubblewrap.run("ls /proc | grep -c '^[0-9]'").output.split()) == 1
    assert int(bubblewrap.run("ls /proc | grep -c '^[0-9]'").output) < 8
    assert bubblewrap.run("cat /proc/2/environ").exit_code != 0


def test_what_killed_processes_left_is_removed(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, young = (tmp_path / f"{HOME_PREFIX}{name}" for name in ("left", "young"))
    (left / "work").mkdir(parents=True)
    young.mkdir()
    with ProcessSandbox(LIMITS) as held:
        (home,) = set(tmp_path.iterdir()) - {left, young}
        for path in (left, home):
            os.utime(path, (0, 0))
        SandboxPool(lambda: held).close()
        assert set(tmp_path.iterdir()) == {young, home}
        assert held.run("echo alive").output == "alive\n"
    assert set(tmp_path.iterdir()) == {young}


def test_fork_bomb_is_contained(bubblewrap):
    if os.geteuid() != 0:
        pytest.skip("only root can give a sandbox a user number, and so a process limit, of its own")
    result = bubblewrap.run("bomb() { bomb | bomb & }; bomb; sleep 1; echo over", timeout_s=4)
    assert "fork" in result.output or result.timed_out
    assert bubblewrap.run("echo alive").output == "alive\n"


def test_disk_is_limited(bubblewrap):
    result = bubblewrap.run("for i in 1 2 3 4; do head -c 8000000 /dev/zero > f$i || exit 9; done")
    assert result.exit_code == 9
    bubblewrap.reset()
    assert bubblewrap.run("echo room > again").exit_code == 0


def test_killing_everything_breaks_the_episode_only(bubblewrap):
    with pytest.raises(EnvironmentBroken):
        bubblewrap.run("kill -9 -1; sleep 1")
    with pytest.raises(EnvironmentBroken):
        bubblewrap.run("true")


def test_closing_while_a_command_runs_ends_both(sandbox):
    ended = []

    def command():
        with pytest.raises(EnvironmentBroken):
            sandbox.run("sleep 60", timeout_s=60)
        ended.append(time.monotonic())

    thread = threading.Thread(target=command)
    thread.start()
    time.sleep(0.5)
    with pytest.raises(EnvironmentBroken, match="busy"):
        sandbox.reset()
    sandbox.close()
    thread.join(timeout=10)
    assert ended


def test_pool_gives_back_only_what_is_whole():
    made = []

    def factory():
        made.append(ProcessSandbox(LIMITS))
        return made[-1]

    with SandboxPool(factory) as pool:
        with pool.lend() as first:
            first.write({"left": b"behind"})
        with pool.lend() as again:
            assert again is first
            assert again.read() == {}
        with pytest.raises(KeyError), pool.lend():
            raise KeyError
        with pool.lend() as other:
            assert other is not first
    assert len(made) == 2
