"""Containers that die or are abandoned, and a daemon that is killed."""

import shutil
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker.daemon import DockerHost
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from tools.support.docker_engine import IMAGE, Daemon, processes_with

LIMITS = DockerLimits(timeout_s=5, memory_mib=300, disk_mib=64, processes=48, output_bytes=2000)


@pytest.fixture(scope="module")
def shared(docker_host):
    """A container for commands that leave it unchanged."""
    with DockerSandbox(docker_host, IMAGE, LIMITS) as opened:
        yield opened


def test_a_container_that_dies_or_is_removed_breaks_the_episode(docker_host):
    for end, why in ((docker_host.client.api.kill, "the container ended"), (docker_host.remove, "removed by somebody")):
        with DockerSandbox(docker_host, IMAGE, LIMITS) as sandbox:
            threading.Timer(0.5, end, [sandbox._container]).start()
            with pytest.raises(EnvironmentBroken, match=rf"the container ended|{why}"):
                sandbox.run("sleep 30", timeout_s=30)
            time.sleep(0.5)  # until the container is gone
            with pytest.raises(EnvironmentBroken, match=why):
                sandbox.run("true")


def test_a_missing_image_and_an_absent_daemon_are_clear_errors(docker_host, tmp_path):
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


DRIVER = """
import sys, time
from megatron_dagger.sandbox.docker.sandbox import DockerSandbox
from megatron_dagger.sandbox.docker.daemon import DockerHost
sandbox = DockerSandbox(DockerHost("killed", sys.argv[1]), sys.argv[2])
print(sandbox._container, flush=True)
sandbox.run("sleep 12345", timeout_s=600)
"""


def test_containers_of_a_killed_driver_are_reaped(daemon, docker_host, shared):
    command = [sys.executable, "-c", DRIVER, daemon.url, IMAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        orphan = driver.stdout.readline().strip()
        assert docker_host.reap() == []  # it lives
        driver.kill()
        driver.wait(timeout=10)
    assert docker_host.reap() == [orphan]
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
    sandbox.close()  # no daemon can remove the container now
    threading.Timer(1, daemon.start).start()
    with DockerSandbox(docker_host, IMAGE, LIMITS) as next_sandbox:  # waits for the daemon
        assert next_sandbox.run("echo alive").output == "alive\n"
        assert container not in docker_host.containers()
    assert not processes_with("sleep 23456")


def test_a_container_that_a_killed_daemon_has_forgotten_is_ended_by_the_next_start(daemon, docker_host):
    sandbox = DockerSandbox(docker_host, IMAGE, LIMITS)
    container = sandbox._container
    threading.Timer(0.5, daemon.kill).start()
    with pytest.raises(EnvironmentBroken):
        sandbox.run("sleep 34567", timeout_s=30)
    shutil.rmtree(daemon.home / "data" / "containers" / container)  # as if it was killed while it removed it
    daemon.start()
    assert container not in docker_host.containers()
    assert processes_with(f"containerd-shim.*{container}"), "the daemon has ended it itself: nothing is tested"
    with DockerHost("next", daemon.url) as host:
        host.reap()
    assert not processes_with(f"containerd-shim.*{container}")
    assert not processes_with("sleep 34567")
    sandbox.close()


def test_another_daemon_of_this_host_does_not_end_what_it_never_knew(docker_host):
    other = Daemon(tempfile.mkdtemp(prefix="megatron-dagger-docker-"))
    try:
        other.start()
        with DockerHost("other", other.url) as host:
            assert host.client.info()["DockerRootDir"] != docker_host.client.info()["DockerRootDir"]
            with DockerSandbox(docker_host, IMAGE, LIMITS) as sandbox:
                host.reap()
                assert sandbox.run("echo alive").output == "alive\n"
    finally:
        other.stop()
        shutil.rmtree(other.home, ignore_errors=True)
