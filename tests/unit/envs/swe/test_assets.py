"""Binary files that a row names by address are in place when its tests run."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron_dagger.envs.swe.assets import _fetch, with_assets
from megatron_dagger.envs.swe.pytest_script import eval_script
from megatron_dagger.sandbox.base import EnvironmentBroken, SandboxLimits
from megatron_dagger.sandbox.local import ProcessSandbox

PICTURE = bytes(range(256))


@pytest.fixture
def address():
    """The address of a server that has the picture, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/picture", "/short") else 404)
            if self.path == "/short":
                self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(PICTURE if self.path == "/picture" else b"not here")

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_picture_is_in_place_just_before_the_tests(tmp_path, monkeypatch, address):
    monkeypatch.setattr("megatron_dagger.envs.swe.assets._FOLDER", str(tmp_path / "assets"))
    with ProcessSandbox(SandboxLimits(timeout_s=60)) as sandbox:
        script = eval_script("cat 'new folder/a.png'", workdir=".", activate="true")
        script = with_assets(script, sandbox, [("new folder/a.png", f"{address}/picture")])
        sandbox.write_file("eval.sh", script.encode())
        sandbox.run("bash eval.sh > out 2> /dev/null")
        assert sandbox.read_file("out") == PICTURE


def test_a_picture_that_cannot_be_had_breaks_the_environment_not_the_verdict(address):
    with (
        ProcessSandbox(SandboxLimits(timeout_s=60)) as sandbox,
        pytest.raises(EnvironmentBroken, match="/none, which the task's tests read, cannot be fetched"),
    ):
        with_assets("", sandbox, [("a.png", f"{address}/none")])
    with pytest.raises(EnvironmentBroken, match="8 of 9999 bytes have come"):
        _fetch(f"{address}/short")


def test_a_script_that_does_not_say_where_its_tests_begin_is_refused(address):
    with (
        ProcessSandbox(SandboxLimits(timeout_s=60)) as sandbox,
        pytest.raises(EnvironmentBroken, match="has no line with"),
    ):
        with_assets("pytest\n", sandbox, [("a.png", f"{address}/picture")])
    assert with_assets("pytest\n", sandbox, []) == "pytest\n"
