"""Fixtures of unit and integration tests: one Docker daemon for all of them."""

from contextlib import ExitStack

import pytest


def pytest_collection_modifyitems(config, items):
    """On several processes, begin with the integration tests: no long one is left at the end for one process alone."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: "integration" not in item.path.parts)


@pytest.fixture(scope="session")
def daemon():
    from tools.support.docker_engine import DaemonStartError, docker_daemon, missing

    if reason := missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            running = stack.enter_context(docker_daemon())
        except DaemonStartError as error:
            pytest.skip(f"dockerd does not start here: {error}")
        yield running


@pytest.fixture(scope="session")
def docker_host(daemon):
    from megatron_dagger.sandbox.docker.daemon import DockerHost

    with DockerHost("tests", daemon.url) as host:
        yield host
