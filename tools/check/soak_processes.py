"""The processes of a run that is killed at random: find them by kind, kill one, start again what has ended."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self

import psutil

from megatron_dagger.sandbox.base import EnvironmentBroken
from megatron_dagger.sandbox.docker.daemon import DockerHost, broken_as
from tools.support.chat_server import Answer, ChatServer
from tools.support.docker_engine import Daemon
from tools.support.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
AWAY_S = 1.0  # how long a killed service stays away
DEADLINE_S = 1800.0  # of a run without kills
POLL_S = 0.1
_TAIL_CHARACTERS = 3000
_PR_SET_CHILD_SUBREAPER = 36


class SoakError(RuntimeError):
    """A run did not go on after a kill, or failed without one."""


class Service(Protocol):
    """A process beside the run, which is started again after a kill."""

    kind: str

    def victims(self) -> list[int]:
        """Return the ids of its processes that may be killed."""
        ...

    def restart(self) -> None:
        """Start it again if it was killed."""
        ...


class TeacherServer:
    """A teacher's server in a process of its own, always at the same address."""

    kind = "teacher"

    def __init__(self, answer: Answer) -> None:
        self._answer, self._port = answer, free_port()
        self._process: multiprocessing.process.BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def victims(self) -> list[int]:
        return [self._process.pid] if self._process and self._process.pid else []

    def restart(self) -> None:
        if self._process is None or not self._process.is_alive():
            fork = multiprocessing.get_context("fork")
            self._process = fork.Process(target=_serve, args=(self._answer, self._port), daemon=True)
            self._process.start()

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process:
            self._process.kill()
            self._process.join()


def _serve(answer: Answer, port: int) -> None:
    with ChatServer(answer, port) as server:
        server.serve_forever()


class DockerDaemon:
    """dockerd."""

    kind = "daemon"

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    def victims(self) -> list[int]:
        process = self.daemon.process
        return [process.pid] if process and process.poll() is None else []

    def restart(self) -> None:
        if not self.daemon.is_running():
            self.daemon.start()

    def containers(self) -> list[int]:
        """Return the ids of the containers' main processes."""
        with (
            contextlib.suppress(EnvironmentBroken),  # some may end meanwhile
            DockerHost("soak", self.daemon.url, timeout_s=30) as host,
            broken_as("the containers' processes are not known"),
        ):
            running = host.client.api.containers()
            pids = [host.client.api.inspect_container(c["Id"])["State"]["Pid"] for c in running]
            return [pid for pid in pids if pid > 0]  # 0: it has ended
        return []


@contextlib.contextmanager
def daemon_service(daemon: Daemon) -> Iterator[DockerDaemon]:
    """Yield a daemon as a service; it runs when the block ends."""
    service = DockerDaemon(daemon)
    try:
        yield service
    finally:
        service.restart()


class Disturbed:
    """Does runs to their end, killing a process of a random kind after random pauses until ``kills`` are done."""

    def __init__(self, services: Sequence[Service], *, kills: int, pause_s: float, seed: int) -> None:
        self.services, self.remaining, self.pause_s = services, kills, pause_s
        self.killed: Counter[str] = Counter()
        self.starts = 0
        self._random = random.Random(seed)
        # What its parent leaves behind becomes this process's child, and is counted at the end
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def finish(self, run: Path) -> None:
        """Do a run to its end. Raises SoakError if it cannot be done."""
        deadline, failures = time.monotonic() + DEADLINE_S, 0
        while failures < 2:  # what was killed shortly before may end one start, but no other
            driver = self._start(run)
            try:
                while driver.poll() is None:
                    if time.monotonic() > deadline:
                        raise SoakError(f"{run} has not ended {DEADLINE_S:.0f} s after the last kill: {_tail(run)}")
                    if self._pause(driver) and self.remaining and self._kill_one(driver):
                        deadline, failures = time.monotonic() + DEADLINE_S, -1
            finally:
                driver.kill()
                driver.wait()
            if driver.returncode == 0:
                return
            failures += 1
        raise SoakError(f"{run} ended with {driver.returncode}, but no process was killed: {_tail(run)}")

    def _start(self, run: Path) -> subprocess.Popen[bytes]:
        self.starts += 1
        command = [sys.executable, "-m", "megatron_dagger.cli.main", "run", str(run)]
        with open(_log(run), "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _pause(self, driver: subprocess.Popen[bytes]) -> bool:
        """Wait for a random time, or until the driver has ended; return whether it goes on."""
        end = time.monotonic() + self._random.expovariate(1 / self.pause_s)
        while driver.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        return driver.poll() is None

    def _kill_one(self, driver: subprocess.Popen[bytes]) -> bool:
        """Kill a process of one of the kinds that are there, rather of a rare one; return whether one was."""
        victims = run_processes(driver.pid)
        for service in self.services:
            victims[service.kind] = service.victims()
            if isinstance(service, DockerDaemon):
                victims["sandbox"] = service.containers()
        kinds = sorted(kind for kind, pids in victims.items() if pids)
        rarely = [1 / (1 + self.killed[kind]) for kind in kinds]  # some kinds are there only at times
        (kind,) = self._random.choices(kinds, rarely)
        try:
            os.kill(self._random.choice(victims[kind]), signal.SIGKILL)
        except ProcessLookupError:
            return False
        self.killed[kind] += 1
        self.remaining -= 1
        print(f"kill {sum(self.killed.values())}: {kind}; {self.remaining} to go", flush=True)
        if kind in {service.kind for service in self.services}:
            time.sleep(AWAY_S)
            for service in self.services:
                service.restart()
        return True


def run_processes(driver: int) -> dict[str, list[int]]:
    """Return the ids of a run's processes by kind."""
    kinds: dict[str, list[int]] = {"driver": [driver], "rank": [], "engine": [], "sandbox": []}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = " ".join(process.cmdline())
                if "VLLM::" in line:
                    kinds["engine"].append(process.pid)
                elif "megatron_dagger.training" in line:
                    kinds["rank"].append(process.pid)
                elif "/sandbox/server.py" in line:
                    kinds["sandbox"].append(process.pid)
    return kinds


def leftover_processes(services: Sequence[Service], *, settle_s: float = 10.0) -> list[psutil.Process]:
    """Return this process's descendants but for the services, once killed ones have had time to vanish.

    Of a container daemon's descendants the containers' parents count, not the daemon's own containerd.
    """
    end = time.monotonic() + settle_s
    while processes := _descendants(services):
        if time.monotonic() > end:
            for process in processes:
                print(f"left behind: {process.pid} {' '.join(process.cmdline())[:200]}", flush=True)
            break
        time.sleep(POLL_S)
    return processes


def _descendants(services: Sequence[Service]) -> list[psutil.Process]:
    known = {pid for service in services for pid in service.victims()}
    processes = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                if process.ppid() == os.getpid() and process.pid not in known:
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
            elif process.pid not in known and Path(process.exe()).name != "containerd":
                processes.append(process)
    return processes


def _log(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def _tail(run: Path) -> str:
    return _log(run).read_text(errors="replace")[-_TAIL_CHARACTERS:]
