"""A chat completions server on the loopback interface whose behaviour a test scripts.

``python -m tools.support.chat_server PORT`` serves the repair tasks' expert as a teacher.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.types import Message

PATHS = ("/v1/chat/completions", "/v1/completions")
Answer = Callable[[dict[str, Any]], str | int | dict[str, Any] | tuple[Any, ...]]


class ChatServer(ThreadingHTTPServer):
    """``answer(request)`` returns the response's text, its status, its JSON body, or (status, body[, headers]).

    ``requests`` and ``headers`` are those received so far. Every response takes ``delay_s``.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Answer, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.delay_s = answer, 0.0
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.max_concurrent = self.concurrent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.concurrent += 1
            server.max_concurrent = max(server.max_concurrent, server.concurrent)
        time.sleep(server.delay_s)
        answer = server.answer(request) if self.path in PATHS else 404
        with server.lock:
            server.concurrent -= 1
        body: dict[str, Any]
        headers: dict[str, str] = {}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        match answer:
            case int():
                status, body = answer, {"error": f"status {answer}"}
            case (int() as status, body):
                pass
            case (int() as status, body, headers):
                pass
            case dict():
                status, body = 200, answer
            case _:
                status = 200
                body = {"choices": [{"message": {"role": "assistant", "content": answer}}], "usage": usage}
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Log nothing."""


@contextmanager
def chat_server(answer: Answer, port: int = 0) -> Iterator[ChatServer]:
    """Yield a server that runs in threads of this process until the block ends."""
    with ChatServer(answer, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def expert(request: dict[str, Any]) -> str:
    """Answer as the repair tasks' expert does."""
    return next_command(tuple(Message(**message) for message in request["messages"]))


if __name__ == "__main__":
    with ChatServer(expert, int(sys.argv[1])) as server:
        server.serve_forever()
