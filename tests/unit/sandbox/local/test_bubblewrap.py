"""Isolation by bubblewrap: files, network, processes, disk."""

import os
import socket
import subprocess
import sys

import pytest

from megatron_dagger.sandbox.base import EnvironmentBroken


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


def test_fork_bomb_is_contained(bubblewrap):
    if os.geteuid() != 0:
        pytest.skip("only root can give a sandbox its own user id, and so its own process limit")
    result = bubblewrap.run("bomb() { bomb | bomb & }; bomb; sleep 1; echo over", timeout_s=4)
    assert "fork" in result.output or result.timed_out
    assert bubblewrap.run("echo alive").output == "alive\n"


def test_a_shell_and_its_children_have_the_limits(bubblewrap):
    limits = "ulimit -t; ulimit -v; ulimit -c; ulimit -n"
    for command in (limits, f"sh -c '{limits}'"):
        assert bubblewrap.run(command, timeout_s=7).output.split() == ["9", str(400 << 10), "0", "256"]
    assert bubblewrap.run("ulimit -v unlimited || ulimit -n 300").exit_code != 0
    assert bubblewrap.run("ls /proc/self/fd; cat").output.split() == ["0", "1", "2", "3"]  # 3 is of ls itself


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
