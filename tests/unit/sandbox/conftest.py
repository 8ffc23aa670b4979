"""The sandbox engines; a new engine is one entry here, and runs the conformance suite."""

import pytest

from megatron_dagger.sandbox.base import SandboxLimits
from megatron_dagger.sandbox.docker import DockerLimits, DockerSandbox
from megatron_dagger.sandbox.local import BubblewrapSandbox, ProcessSandbox, bubblewrap_works
from tools.support.docker_engine import IMAGE

LIMITS = SandboxLimits(timeout_s=5, memory_mib=400, disk_mib=16, processes=24, output_bytes=2000)
DOCKER_LIMITS = DockerLimits(timeout_s=5, memory_mib=400, disk_mib=64, processes=24, output_bytes=2000)


def open_process(request):
    return ProcessSandbox(LIMITS)


def open_bubblewrap(request):
    if not bubblewrap_works():
        pytest.skip("bubblewrap does not work here")
    return BubblewrapSandbox(LIMITS)


def open_docker(request):
    return DockerSandbox(request.getfixturevalue("docker_host"), IMAGE, DOCKER_LIMITS, root="/work")


ENGINES = {"bubblewrap": open_bubblewrap, "process": open_process, "docker": open_docker}
MEMORY_IS_SHARED = ("docker",)  # engines whose memory limit is the sandbox's, not each process's


@pytest.fixture(params=ENGINES)
def engine(request):
    return request.param


@pytest.fixture
def sandbox(engine, request):
    with ENGINES[engine](request) as opened:
        yield opened


@pytest.fixture
def bubblewrap(request):
    with open_bubblewrap(request) as opened:
        yield opened
