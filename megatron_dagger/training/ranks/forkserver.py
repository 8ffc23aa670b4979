"""A server process that has imported torch and Megatron-Core, and forks ranks that need not import them again.

``RankServer`` is the driver's end; ``python -m megatron_dagger.training.ranks.forkserver`` is the process. It has one
thread, never computes, and ends with the driver; its ranks end with it. multiprocessing's forkserver is not used: its
children keep the server alive when the driver is killed, each child runs the driver's main module again, a failed
preload is silent, and there is only one per process, which the driver's rollout engine may need.

Variables that torch and OpenMP read on import have the server's values. A rank gets its own environment, ``sys.path``
and working directory before its module runs.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import IO

from megatron_dagger.signals import STOP_SIGNALS, parent_death_hook

STORE_FD = "MEGATRON_DAGGER_STORE_FD"  # a listening socket that ``launch`` hands to rank 0

# Else numpy starts threads on import. A rank sets the number of torch's threads itself.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_POLL_S = 0.05
_IDLE_S = 1.0
_END_S = 10.0  # a killed rank is gone long before that
_PR_SET_NAME = 15


class RankServerError(RuntimeError):
    """The server ended, and its ranks with it; says how, with the end of its output."""


class RankServer:
    """A server that imports the modules ``preload`` in the background; ``fork`` may be called at once."""

    def __init__(self, preload: Sequence[str], environment: Mapping[str, str]):
        self._requests, server_end = socket.socketpair()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(server_end.fileno()), str(os.getpid()), *preload],
                env={**environment, **_ONE_THREAD, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[server_end.fileno()],
            )
        self.pid = self._process.pid
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        """Whether the server runs."""
        return self._process.poll() is None

    def fork(
        self, module_args: Sequence[str], variables: Mapping[str, str], log: IO[bytes], store: socket.socket | None
    ) -> ForkedRank:
        """Return a child that runs ``python -m *module_args`` with ``variables`` as its environment.

        The child writes to ``log`` and inherits the listening socket ``store``, whose number it finds in STORE_FD.
        Raises RankServerError if the server has ended.
        """
        connection, rank_end = Pipe()
        descriptors = [rank_end.fileno(), log.fileno(), *([store.fileno()] if store is not None else [])]
        with rank_end:
            try:
                socket.send_fds(self._requests, [b"\0"], descriptors)
            except OSError as error:
                raise self.error() from error
        return ForkedRank(self, connection, ([*module_args], {**variables}, os.getcwd()))

    def error(self) -> RankServerError:
        """Return an error that says why the server no longer answers."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            how = "does not answer"
        else:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")[-4000:]
        return RankServerError(f"the process that the ranks are forked from {how}" + (f":\n{text}" if text else ""))

    def close(self) -> None:
        """Kill the server and its ranks. May be called twice."""
        atexit.unregister(self.close)
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._output.close()


class ForkedRank:
    """The driver's handle of a rank, like a Popen: a child of the server, which reports its exit code."""

    def __init__(self, server: RankServer, connection: Connection, job: tuple[list[str], dict[str, str], str]):
        self._server, self._connection, self._job = server, connection, job
        self.pid: int | None = None  # of the rank and its process group, once reported
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (-N: killed by signal N), None while it runs. Raises RankServerError."""
        try:
            while self.returncode is None and self._connection.poll():
                report, number = self._connection.recv()
                if report == "pid":
                    self.pid = number
                    with contextlib.suppress(ConnectionError):  # the rank was killed, and its exit code follows
                        self._connection.send(self._job)
                else:
                    self.returncode = number
        except (EOFError, OSError) as error:
            raise self._server.error() from error
        return self.returncode

    def end(self) -> None:
        """Kill the rank and its process group, and wait for it; a rank that has not got its job yet ends by itself."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            if self.returncode is None:
                self._connection.poll(_END_S)
        self._connection.close()


def main() -> None:
    """Import, then fork a rank for each request until the driver is gone. In a rank: run its module."""
    for number in STOP_SIGNALS:  # SLURM signals every process; this one ends with the driver
        signal.signal(number, signal.SIG_IGN)
    requests = socket.socket(fileno=int(sys.argv[1]))
    driver = int(sys.argv[2])
    failures = _import(sys.argv[3:], driver)
    gc.freeze()  # keeps a rank's collector from touching, and so copying, shared pages
    job = _serve(requests, driver)
    if job is not None:
        sys.stderr.write(failures)
        sys.argv = job
        runpy.run_module(job[0], run_name="__main__", alter_sys=True)


def _import(names: Sequence[str], driver: int) -> str:
    """Import the modules, exiting if the driver is gone; return the tracebacks of failed imports.

    The driver is checked before each import of a module. A watching thread would make forking unsafe, and
    ``signals.parent_death_hook`` would kill the server as soon as the driver's thread that started it ends.
    """

    def find_spec(*_: object) -> None:
        if os.getppid() != driver:
            os._exit(1)

    failures, watcher = "", types.SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, watcher)
    for name in names:
        try:
            importlib.import_module(name)
        except Exception:
            failures += f"{name} could not be imported in advance:\n{traceback.format_exc()}"
    sys.meta_path.remove(watcher)
    return failures


def _serve(requests: socket.socket, driver: int) -> list[str] | None:
    """Fork a rank per request. Return [module, *args] in each rank, and None in the server when the driver is gone."""
    die_with_server = parent_death_hook()
    ranks: dict[int, Connection] = {}
    while os.getppid() == driver:
        if select.select([requests], [], [], _POLL_S if ranks else _IDLE_S)[0]:
            _, descriptors, _, _ = socket.recv_fds(requests, 1, 3, socket.MSG_CMSG_CLOEXEC)
            if not descriptors:
                break
            connection, log, *store = Connection(descriptors[0]), *descriptors[1:]
            pid = os.fork()
            if pid == 0:
                die_with_server()
                requests.close()
                for other in ranks.values():
                    other.close()
                return _become_rank(connection, log, *store)
            ranks[pid] = connection
            for descriptor in (log, *store):
                os.close(descriptor)
        for pid in list(ranks):
            exited, status = os.waitpid(pid, os.WNOHANG)
            if exited:
                with ranks.pop(pid) as connection, contextlib.suppress(ConnectionError):
                    connection.send(("exit code", os.waitstatus_to_exitcode(status)))
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return None


def _become_rank(connection: Connection, log: int, store: int | None = None) -> list[str]:
    """Set up a forked child as a rank: signals, session, output, environment; return [module, *args]."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    with connection:
        try:
            connection.send(("pid", os.getpid()))
            module_args, variables, directory = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the driver abandoned the launch
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"rank-{variables['RANK']}".encode(), 0, 0, 0)
    os.environ.clear()
    os.environ.update(variables)
    if store is not None:
        os.environ[STORE_FD] = str(store)
    os.chdir(directory)
    first = [directory, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = [*first, *(path for path in sys.path if path not in first)]
    return module_args


if __name__ == "__main__":
    main()
