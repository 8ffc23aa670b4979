"""Images of containers: pulled, prefetched from a registry, evicted under a disk budget."""

import io
import json
import shutil
import socket
import subprocess
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker import images
from megatron_dagger.sandbox.docker.images import ImageStore
from megatron_dagger.sandbox.docker.sandbox import DockerLimits, DockerSandbox
from tests.support.waiting import wait_until
from tools.support.docker_engine import IMAGE
from tools.support.ports import free_port

LIMITS = DockerLimits(timeout_s=5, memory_mib=300, disk_mib=64, processes=48, output_bytes=2000)


def small_image(host, number):
    """Import an image whose only file fills a little more than a MiB; return its name."""
    file = tarfile.TarInfo(f"file{number}")
    file.size = (1 << 20) + number
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.addfile(file, io.BytesIO(bytes([number]) * file.size))
    host.client.api.import_image_from_data(packed.getvalue(), repository="evictable", tag=str(number))
    return f"evictable:{number}"


def test_the_least_recently_used_images_are_evicted_when_the_disk_budget_is_exceeded(docker_host):
    before_mib = docker_host.client.api.df()["LayersSize"] >> 20
    first, second, third, stranger = (small_image(docker_host, number) for number in (1, 2, 3, 4))
    with ImageStore(docker_host, disk_budget_mib=before_mib + 3) as store:
        for image in (first, second, third, first):
            with store.hold(image):
                pass
        with store.hold(second):
            assert store.evict() == [third, first]  # the image in use stays, whatever the budget
        remaining = {tag for image in docker_host.client.images.list() for tag in image.tags}
    assert {second, stranger} <= remaining
    assert not {first, third} & remaining
    for image in (second, stranger):
        docker_host.client.api.remove_image(image)


def test_the_disk_use_can_be_read_by_many_threads_at_once(docker_host):
    with ImageStore(docker_host) as store, ThreadPoolExecutor(8) as threads:
        sizes = [future.result() for future in [threads.submit(store._layers_bytes) for _ in range(40)]]
    assert min(sizes) > 1 << 20


def test_an_image_that_cannot_be_pulled_is_an_error_for_its_user(docker_host, monkeypatch):
    monkeypatch.setattr(images, "FIRST_PAUSE_S", 0.01)
    with ImageStore(docker_host) as store:
        store.prefetch([IMAGE, "localhost:1/nowhere:1"])
        with DockerSandbox(docker_host, IMAGE, LIMITS, images=store) as sandbox:
            assert sandbox.run("echo well").output == "well\n"
            assert store._held[IMAGE] == 1
        assert store._held[IMAGE] == 0
        with pytest.raises(EnvironmentBroken, match="localhost:1/nowhere:1 is missing and cannot be pulled"):
            DockerSandbox(docker_host, "localhost:1/nowhere:1", LIMITS, images=store)


REGISTRY = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/images}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""


@pytest.fixture
def registry(tmp_path):
    """The address of a real registry on the loopback interface, from which Docker pulls images without TLS."""
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry missing: apt-get install docker-registry")
    port = free_port()
    (tmp_path / "registry.yml").write_text(REGISTRY.format(folder=tmp_path, port=port))
    with subprocess.Popen(["docker-registry", "serve", tmp_path / "registry.yml"]) as server:
        try:
            wait_until(lambda: listens(port), deadline_s=60)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def refusing(registry):
    """The address of the same registry through a server that refuses its first three requests, and those requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if len(requests) <= 3:
                body = json.dumps({"errors": [{"code": "TOOMANYREQUESTS", "message": "pull rate limit"}]}).encode()
                self.answer(429, {"Content-Type": "application/json"}, body)
                return
            asked = {name: value for name, value in self.headers.items() if name in ("Accept", "Range")}
            try:
                with urlopen(Request(f"http://{registry}{self.path}", headers=asked, method=self.command)) as response:
                    self.answer(response.status, response.headers, response.read())
            except HTTPError as error:
                self.answer(error.code, error.headers, error.read())

        do_HEAD = do_GET

        def answer(self, status, headers, body):
            self.send_response(status)
            for name, value in headers.items():
                if name not in ("Date", "Content-Length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", headers.get("Content-Length") or str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            """Log nothing."""

    requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}", requests
        server.shutdown()
        thread.join()


def test_a_registry_that_refuses_for_a_while_is_waited_for(docker_host, registry, refusing, monkeypatch, caplog):
    monkeypatch.setattr(images, "REFUSED_PAUSE_S", 0.2)
    monkeypatch.setattr(images, "PULL_ATTEMPTS", 1)
    address, requests = refusing
    client, local = docker_host.client, small_image(docker_host, 21)
    client.api.tag(local, f"{registry}/refused:1")
    assert "error" not in client.api.push(f"{registry}/refused:1")
    for tag in (local, f"{registry}/refused:1"):
        client.api.remove_image(tag)
    with ImageStore(docker_host) as store, store.hold(f"{address}/refused:1"):
        assert images.has_image(docker_host, f"{address}/refused:1")
    assert len(requests) > 3
    assert "docker login, or swe.image_prefix for a mirror" in caplog.text
    client.api.remove_image(f"{address}/refused:1")


def test_images_are_prefetched_from_a_registry_unless_the_budget_is_exceeded(docker_host, registry):
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
        assert images.has_image(docker_host, first) and images.has_image(docker_host, second)
        with store.hold(first):
            store._budget_bytes = 0
        assert store.evict() == [first, second], "prefetched images that nobody has used yet are evicted last"
        store.prefetch([third])
        assert store._pulls[third].result(60) is None
        assert not images.has_image(docker_host, third), "the budget has no room to prefetch it"
        store._budget_bytes = (used_mib + 100) << 20
        with store.hold(third):
            assert images.has_image(docker_host, third)
        client.api.remove_image(third)
