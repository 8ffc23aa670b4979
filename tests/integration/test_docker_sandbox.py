"""What only a container can be asked: state between commands, hostile commands, lost containers and daemons."""

import io
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from megatron_dagger.envs.base import EnvironmentBroken
from megatron_dagger.sandbox.docker import images
from megatron_dagger.sandbox.docker import sandbox as docker
from megatron_dagger.sandbox.docker import shell as container_shell
from megatron_dagger.sandbox.docker.daemon import DockerHost, is_gone, owner
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from megatron_dagger.types import StopReason
from tools.support.docker_engine import IMAGE, processes_with, wait_for
from tools.support.ports import free_port

LIMITS = DockerLimits(timeout_s=5, memory_mib=300, disk_mib=64, processes=48, output_bytes=2000)


@pytest.fixture(scope="module")
def shared(docker_host):
    """One container for the commands that leave it as it was."""
    with DockerSandbox(docker_host, IMAGE, LIMITS) as made:
        yield made


@pytest.fixture
def sandbox(docker_host):
    with DockerSandbox(docker_host, IMAGE, LIMITS) as made:
        yield made


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


def test_the_state_outlives_what_cuts_a_command_short(shared):
    shared.run("export STEP=1")
    assert shared.run("export STEP=2; kill -9 $$").exit_code == 137
    assert shared.run("export AT=$STEP; sleep 60", timeout_s=2).timed_out
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
    word = f"77{time.monotonic_ns() % 10**7}"
    shared.run(daemon_command.format(word) + " echo started")
    assert not processes_with(f"sleep {word}")


def test_endless_output_is_cut_off(shared, monkeypatch):
    monkeypatch.setattr(docker, "MOST_OUTPUT_BYTES", 4 << 20)
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


def test_a_memory_bomb_in_a_child_is_no_observation(sandbox):
    with pytest.raises(EnvironmentBroken, match="300 MiB") as broken:
        sandbox.run("(python3 -c 'x = bytearray(900 << 20)' &) ; sleep 2; echo as if nothing had been")
    assert broken.value.reason is StopReason.OUT_OF_MEMORY


@pytest.mark.parametrize("pause_s", [0, 2])
def test_a_disk_filler_is_no_observation(sandbox, pause_s):
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


def test_a_container_that_dies_or_is_removed_breaks_the_episode(docker_host):
    for end, why in ((docker_host.client.api.kill, "the container ended"), (docker_host.remove, "removed by somebody")):
        with DockerSandbox(docker_host, IMAGE, LIMITS) as sandbox:
            threading.Timer(0.5, end, [sandbox._container]).start()
            with pytest.raises(EnvironmentBroken, match=rf"the container ended|{why}"):
                sandbox.run("sleep 30", timeout_s=30)
            time.sleep(0.5)  # until all of it is gone
            with pytest.raises(EnvironmentBroken, match=why):
                sandbox.run("true")


def test_a_missing_image_and_an_absent_daemon_are_clear(docker_host, tmp_path):
    with pytest.raises(EnvironmentBroken, match="nowhere/image:1 is not on this machine: pull or build"):
        DockerSandbox(docker_host, "nowhere/image:1")
    with pytest.raises(EnvironmentBroken, match="daemon cannot be reached"):
        DockerHost("tests", f"unix://{tmp_path}/none.sock")


def test_closing_removes_the_container(docker_host):
    sandbox = DockerSandbox(docker_host, IMAGE, LIMITS)
    container = sandbox._container
    assert container in docker_host.containers()
    sandbox.close()
    sandbox.close()
    assert container not in docker_host.containers()


def test_the_owner_of_a_container():
    mine = owner()
    assert not is_gone(mine)
    host, boot, pid, _ = mine.rsplit(" ", 3)
    assert is_gone(f"{host} {boot} {pid} 1")
    assert is_gone(f"{host} another-boot {pid} 1")
    assert not is_gone(f"another-host {boot} {pid} 1")
    with subprocess.Popen(["sleep", "60"]) as other:
        name = owner(other.pid)
        assert not is_gone(name)
        other.kill()
    assert is_gone(name)


DRIVER = """
import sys, time
from megatron_dagger.sandbox.docker.sandbox import DockerSandbox
from megatron_dagger.sandbox.docker.daemon import DockerHost
sandbox = DockerSandbox(DockerHost("killed", sys.argv[1]), sys.argv[2])
print(sandbox._container, flush=True)
sandbox.run("sleep 12345", timeout_s=600)
"""


def test_what_a_killed_driver_left_is_reaped(daemon, docker_host, shared):
    command = [sys.executable, "-c", DRIVER, daemon.url, IMAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        left = driver.stdout.readline().strip()
        assert docker_host.reap() == []  # it lives
        driver.kill()
        driver.wait(timeout=10)
    assert docker_host.reap() == [left]
    assert not processes_with("sleep 12345")
    assert shared.run("echo alive").output == "alive\n"


def test_a_killed_daemon_breaks_the_episode_and_leaves_nothing(daemon, docker_host):
    sandbox = DockerSandbox(docker_host, IMAGE, LIMITS)
    container = sandbox._container
    threading.Timer(0.5, daemon.kill).start()
    with pytest.raises(EnvironmentBroken, match=r"daemon|container"):
        sandbox.run("sleep 23456", timeout_s=30)
    with pytest.raises(EnvironmentBroken):
        sandbox.run("true")
    sandbox.close()  # there is nobody to remove the container now
    threading.Timer(1, daemon.start).start()
    with DockerSandbox(docker_host, IMAGE, LIMITS) as again:  # waits for the daemon
        assert again.run("echo alive").output == "alive\n"
        assert container not in docker_host.containers()
    assert not processes_with("sleep 23456")


def small_image(host, number):
    """An image of its own: its one file fills a MiB and more."""
    file = tarfile.TarInfo(f"file{number}")
    file.size = (1 << 20) + number
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(file, io.BytesIO(bytes([number]) * file.size))
    host.client.api.import_image_from_data(packed.getvalue(), repository="evictable", tag=str(number))
    return f"evictable:{number}"


def test_the_least_recently_used_images_go_when_the_disk_budget_is_spent(docker_host):
    before_mib = docker_host.client.api.df()["LayersSize"] >> 20
    first, second, third, stranger = (small_image(docker_host, number) for number in (1, 2, 3, 4))
    with ImageStore(docker_host, disk_budget_mib=before_mib + 3) as store:
        for image in (first, second, third, first):
            with store.hold(image):
                pass
        with store.hold(second):
            assert store.evict() == [third, first]  # the one in use stays, whatever the budget
        there = {tag for image in docker_host.client.images.list() for tag in image.tags}
    assert {second, stranger} <= there
    assert not {first, third} & there
    for image in (second, stranger):
        docker_host.client.api.remove_image(image)


def test_the_disk_use_can_be_asked_for_by_many_at_once(docker_host):
    with ImageStore(docker_host) as store, ThreadPoolExecutor(8) as threads:
        sizes = [asked.result() for asked in [threads.submit(store._layers_bytes) for _ in range(40)]]
    assert min(sizes) > 1 << 20


def test_an_image_that_cannot_be_had_is_told_to_who_asks(docker_host, monkeypatch):
    monkeypatch.setattr(images, "FIRST_PAUSE_S", 0.01)
    with ImageStore(docker_host) as store:
        store.prefetch([IMAGE, "localhost:1/nowhere:1"])
        with DockerSandbox(docker_host, IMAGE, LIMITS, images=store) as sandbox:
            assert sandbox.run("echo well").output == "well\n"
            assert store._held[IMAGE] == 1
        assert store._held[IMAGE] == 0
        with pytest.raises(EnvironmentBroken, match="localhost:1/nowhere:1 is not here and cannot be pulled"):
            DockerSandbox(docker_host, "localhost:1/nowhere:1", LIMITS, images=store)


REGISTRY = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/images}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture
def registry(tmp_path):
    """A real registry on the loopback, which Docker takes images from without TLS; its address."""
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry missing: apt-get install docker-registry")
    port = free_port()
    (tmp_path / "registry.yml").write_text(REGISTRY.format(folder=tmp_path, port=port))
    with subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"]) as server:
        try:
            wait_for(lambda: listens(port))
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_images_are_pulled_ahead_out_of_a_registry_and_none_when_the_budget_is_spent(docker_host, registry):
    client, names = docker_host.client, []
    for number in (11, 12, 13):
        local, name = small_image(docker_host, number), f"{registry}/ahead:{number}"
        client.api.tag(local, name)
        assert "error" not in client.api.push(name)
        for tag in (local, name):
            client.api.remove_image(tag)
        names.append(name)
    first, second, third = names
    used_mib = client.api.df()["LayersSize"] >> 20
    with ImageStore(docker_host, disk_budget_mib=used_mib + 100, concurrent_pulls=2) as store:
        store.prefetch([first, second])
        assert [store._pulls[name].result(60) for name in (first, second)] == [None, None]  # and evict no more
        assert images.is_here(docker_host, first) and images.is_here(docker_host, second)
        with store.hold(first):
            store._budget_bytes = 0
        assert store.evict() == [first, second], "what is still waited for goes last"
        store.prefetch([third])
        assert store._pulls[third].result(60) is None
        assert not images.is_here(docker_host, third), "there is no room to pull it ahead"
        store._budget_bytes = (used_mib + 100) << 20
        with store.hold(third):
            assert images.is_here(docker_host, third)
        client.api.remove_image(third)


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("a/b", ("a/b", "latest")),
        ("a/b:1", ("a/b", "1")),
        ("host:5000/a/b", ("host:5000/a/b", "latest")),
        ("host:5000/a/b:2", ("host:5000/a/b", "2")),
        ("a/b@sha256:12", ("a/b@sha256:12", None)),
    ],
)
def test_names_of_images(image, parts):
    assert images._name_and_tag(image) == parts


def test_frames_are_cut_where_they_end():
    frame = b"\x01\0\0\0\0\0\0\x03abc"
    assert container_shell._frames(frame + frame[:9]) == (b"abc", frame[:9])
    assert container_shell._frames(frame * 2) == (b"abcabc", b"")
    assert container_shell._frames(b"\x01\0") == (b"", b"\x01\0")
