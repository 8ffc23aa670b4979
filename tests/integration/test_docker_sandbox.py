"""Properties of containers only: state between commands, and limits against hostile commands."""

import time

import pytest

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker import sandbox as docker
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.types import StopReason
from tools.support.docker_engine import IMAGE, processes_with

LIMITS = DockerLimits(timeout_s=5, memory_mib=300, disk_mib=64, processes=48, output_bytes=2000)


@pytest.fixture(scope="module")
def shared(docker_host):
    """A container for commands that leave it unchanged."""
    with DockerSandbox(docker_host, IMAGE, LIMITS) as opened:
        yield opened


@pytest.fixture
def sandbox(docker_host):
    with DockerSandbox(docker_host, IMAGE, LIMITS) as opened:
        yield opened


def test_directory_environment_and_functions_are_kept(shared):
    shared.run('mkdir -p a/b && cd a/b && export COLOR=\'blue "sky"\' && greet() { echo "hello $1"; }; plain=1')
    result = shared.run('pwd; echo "$COLOR"; greet you; echo "<$plain>"; false')
    assert result.output == '/testbed/a/b\nblue "sky"\nhello you\n<>\n'
    assert result.exit_code == 1
    shared.run("export command=id REPLY=id script=id stdin=id root=/")
    assert shared.run("echo well").output == "well\n"
    shared.run("cd ..; set -x; exit 7")
    assert shared.run("pwd").output == "/testbed/a\n"
    shared.run("cd /testbed; unset COLOR; rm -rf a")
    assert shared.run('echo "<$COLOR>"; pwd').output == "<>\n/testbed\n"


def test_the_state_survives_interrupted_commands(shared):
    shared.run("export STEP=1")
    assert shared.run("export STEP=2; kill -9 $$").exit_code == 137
    assert shared.run("export AT=$STEP; sleep 60", timeout_s=5).timed_out
    assert shared.run("echo $STEP $AT").output == "1 1\n"
    for damage in ("echo '(((' > /.sandbox/state", "rm -rf /.sandbox", "rm -rf /.sandbox; touch /.sandbox"):
        shared.run(damage)
        assert shared.run("pwd").output == "/testbed\n"
    shared.run("rm -f /.sandbox")


def test_commands_of_any_text(shared):
    assert shared.run("cat <<'END'\n$x `y` \\ 'é' \"\nEND").output == "$x `y` \\ 'é' \"\n"
    assert shared.run('read line; echo "<$line>"').output == "<>\n"  # there is no stdin
    assert shared.run("if true; then").exit_code == 2
    assert shared.run("printf '\\xff\\x00z'").output.endswith("z")
    assert shared.run("#" + "x" * 300_000 + "\necho long").output == "long\n"


def test_files_of_the_container(shared):
    shared.write_file("/tmp/deep/er/note.txt", b"one\ntwo\x00")
    assert shared.read_file("/tmp/deep/er/note.txt") == b"one\ntwo\x00"
    assert shared.read_file("/tmp/deep/er/note.txt", limit=3) == b"one"
    with pytest.raises(FileNotFoundError):
        shared.read_file("/tmp/nothing")
    with pytest.raises(IsADirectoryError):
        shared.read_file("/tmp")
    with pytest.raises(IsADirectoryError):
        shared.write_file("/tmp", b"")


def test_transfers_are_bounded_and_follow_no_link(sandbox):
    sandbox.run("truncate -s 1T huge 2>/dev/null || dd if=/dev/zero of=huge bs=1M count=40; ln huge hard; mknod pipe p")
    with pytest.raises(EnvironmentBroken, match="more than"):
        sandbox.read(limit=1 << 20)
    sandbox.run("rm -f huge hard pipe; ln -s /etc/passwd f; mkdir d; ln -s /etc d/e")
    sandbox.write({"f": b"mine"})
    assert sandbox.read() == {"f": b"mine"}
    assert "root:x:0" in sandbox.run("cat /etc/passwd").output
    for name in ("d/e/passwd", "/etc/passwd", "d/../../etc/passwd", "a\n/etc/passwd"):
        with pytest.raises(EnvironmentBroken, match="leads out"):
            sandbox.write({name: b"x"})
    with pytest.raises(EnvironmentBroken, match="leads out"):
        sandbox.read("d/e")


def test_a_fork_bomb_ends_with_its_command(shared):
    result = shared.run("bomb() { bomb | bomb & }; bomb; sleep 60", timeout_s=2)
    assert result.timed_out or "fork" in result.output
    assert shared.run("echo alive", timeout_s=5).output == "alive\n"
    assert int(shared.run("ls -d /proc/[0-9]* | wc -l").output) < 15


@pytest.mark.parametrize(
    "daemon_command",
    ["setsid sleep {0} &", "nohup sleep {0} >/dev/null 2>&1 &", "(setsid bash -c '(trap \"\" TERM; sleep {0}) &' &)"],
)
def test_a_background_daemon_ends_with_its_command(shared, daemon_command):
    duration = f"77{time.monotonic_ns() % 10**7}"
    shared.run(daemon_command.format(duration) + " echo started")
    assert not processes_with(f"sleep {duration}")


def test_endless_output_is_cut_off(shared, monkeypatch):
    monkeypatch.setattr(docker, "MAX_OUTPUT_BYTES", 4 << 20)
    started = time.monotonic()
    result = shared.run("yes the same again", timeout_s=60)
    assert time.monotonic() - started < 30
    assert result.exit_code == 137
    assert "bytes cut" in result.output and "[killed: more than 4194304 bytes of output]" in result.output
    assert len(result.output) < 2200
    assert not processes_with("yes the same again")
    assert shared.run("echo alive").output == "alive\n"


def test_killing_every_process_kills_only_the_command(shared):
    assert shared.run("echo begun; kill -9 -1; sleep 1").exit_code == 137
    assert shared.run("pkill -9 bash; kill -9 $PPID 1; sleep 0.2; echo on").exit_code in (0, 137)
    assert shared.run("echo alive").output == "alive\n"


def test_a_stopped_shell_is_replaced(shared, monkeypatch):
    monkeypatch.setattr(docker, "GRACE_S", 0.5)
    assert shared.run("kill -STOP $PPID -1; sleep 30", timeout_s=1).timed_out
    assert shared.run("echo alive").output == "alive\n"


def test_a_memory_bomb_in_a_child_breaks_the_episode(sandbox):
    with pytest.raises(EnvironmentBroken, match="300 MiB") as broken:
        sandbox.run("(python3 -c 'x = bytearray(900 << 20)' &) ; sleep 2; echo as if nothing had been")
    assert broken.value.reason is StopReason.OUT_OF_MEMORY


@pytest.mark.parametrize("pause_s", [0, 2])
def test_a_disk_filler_breaks_the_episode(sandbox, pause_s):
    with pytest.raises(EnvironmentBroken, match=r"MiB were written where 64 MiB are allowed"):
        sandbox.run(f"for i in 1 2 3 4 5; do head -c 40000000 /dev/zero > f$i; sleep {pause_s}; done; sleep 0.3")


def test_no_file_grows_beyond_the_disk_limit(shared):
    result = shared.run("head -c 90000000 /dev/zero > /dev/shm/big; echo $?; rm -f /dev/shm/big")
    assert result.output.splitlines()[-1] != "0"


def test_network_host_and_privileges_are_out_of_reach(shared):
    connect = "python3 -c \"import socket; socket.create_connection(('{}', 53), 2)\""
    for address in ("1.1.1.1", "172.17.0.1", "127.0.0.1"):
        assert shared.run(connect.format(address)).exit_code != 0
    assert shared.run("cat /proc/net/dev | tail -n +3 | grep -v lo:").output == ""
    for attempt in (
        "mknod /tmp/disk b 254 0 && head -c 1 /tmp/disk",
        "mkdir -p /tmp/m && mount -t proc proc /tmp/m",
        "unshare -m true",
        "echo b > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/kernel/panic",
        "chroot / true",
        "echo 1 > /sys/fs/cgroup/memory/memory.limit_in_bytes",
        "echo max > /sys/fs/cgroup/memory.max",
        "ls /var/run/docker.sock",
    ):
        assert shared.run(attempt).exit_code != 0, attempt
    assert shared.run("grep -c Cap.*0000000000000000 /proc/self/status").output.strip() in ("4", "5")
    assert "NoNewPrivs:\t1" in shared.run("grep NoNewPrivs /proc/self/status").output
