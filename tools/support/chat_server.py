"""A chat completions server on the loopback, in threads of this process, that a test tells how to behave.

As a program (``python -m``, PORT) the server of a teacher: the repair tasks' expert behind the API.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_dagger.envs.repo_repair.expert import next_command
from megatron_dagger.types import Message

PATHS = ("/v1/chat/completions", "/v1/completions")


class ChatServer(ThreadingHTTPServer):
    """``answer(request)`` gives a reply's text, a status, a whole body or both of these.

    ``requests`` and ``headers``: what came.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[dict], str | int | dict | tuple[int, dict]], port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.requests, self.headers, self.delay_s = answer, [], [], 0.0
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        time.sleep(server.delay_s)
        answer = server.answer(request) if self.path in PATHS else 404
        with server.lock:
            server.at_once -= 1
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        match answer:
            case int():
                status, body = answer, {"error": f"status {answer}"}
            case tuple():
                status, body = answer
            case dict():
                status, body = 200, answer
            case _:
                status = 200
                body = {"choices": [{"message": {"role": "assistant", "content": answer}}], "usage": usage}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        """Quiet."""


@contextmanager
def chat_server(answer: Callable[[dict], str | int], port: int = 0) -> Iterator[ChatServer]:
    with ChatServer(answer, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def expert(request: dict) -> str:
    return next_command(tuple(Message(**message) for message in request["messages"]))


if __name__ == "__main__":
    with ChatServer(expert, int(sys.argv[1])) as server:
        server.serve_forever()
