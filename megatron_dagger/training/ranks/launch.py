"""Starts the ranks of a job on this host, watches them, and leaves none behind.

The ranks are processes with torchrun's variables: on a host without a GPU forked off a ``RankServer``
that lives as long as this process, else started one by one (CUDA's libraries do not bear a fork). Rank 0
inherits a socket that listens already, so there is no race for a free port. Several hosts: run the same
call on each, with NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.gpus import any_driver, visible_gpus
from megatron_dagger.signals import STOPPED, dies_with_this_process
from megatron_dagger.training.ranks.forkserver import (
    STORE_FD,
    ForkedRank,
    RankServer,
    RankServerError,
)

PRELOAD = ("megatron_dagger.training.trainer", "zarr")  # what the ranks' server imports in advance

_POLL_S = 0.05
_OTHERS_MAY_FAIL_S = 1.0  # the rank that died first may be seen after those that it took along
_STOP_DEADLINE_S = 600.0  # for a step and a checkpoint; a cluster that asked us to stop waits less long
_TAIL_LINES = 25
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout")

_server: RankServer | None = None
_server_lock = threading.Lock()


class LaunchError(RuntimeError):
    """A rank failed or the deadline passed; names the rank and ends with the tail of its log."""


class _StartedRank(subprocess.Popen[bytes]):
    def end(self) -> None:
        """Kill the rank and whatever it started (its process group), and wait for it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


@dataclass(frozen=True, kw_only=True)
class _Rank:
    number: int
    process: _StartedRank | ForkedRank
    log: Path


def warm_up(env: Mapping[str, str] | None = None) -> None:
    """Let what ``launch`` needs on this host be imported in the background; on one with a GPU, do nothing."""
    if _forks():
        _running_server(env)


def launch(
    module_args: Sequence[str],
    parallel: ParallelConfig,
    log_dir: Path,
    deadline_s: float,
    *,
    threads: int = 1,
    env: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m *module_args`` once for each of this host's ranks until all have ended well.

    Each rank writes to ``log_dir/rank-N.log``. If one fails, or after ``deadline_s`` seconds, or if
    this process is interrupted or killed, all are killed. Raises LaunchError.

    If a signal handler raises SystemExit, the ranks are sent SIGTERM and may end by themselves first; a
    rank that ends with exit code STOPPED has stopped because it was asked to: SystemExit too.
    """
    if parallel.world_size % parallel.nodes:
        raise ConfigError(
            f"training.parallel.world_size={parallel.world_size} is no multiple of "
            f"training.parallel.nodes={parallel.nodes}"
        )
    check_gpus(parallel, visible_gpus({**os.environ, **(env or {})}))
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[_Rank] = []
    listener = _listen() if parallel.nodes == 1 else None
    try:
        server = _running_server(env) if _forks() else None
        for local_rank in range(parallel.world_size // parallel.nodes):
            variables = {**os.environ, **_variables(parallel, local_rank, threads, listener), **(env or {})}
            store = listener if local_rank == 0 else None
            ranks.append(_start(module_args, variables, log_dir, store, server))
        _watch(ranks, time.monotonic() + deadline_s, deadline_s)
    except SystemExit:
        _stop(ranks)
        raise
    except RankServerError as error:
        raise LaunchError(str(error)) from error
    finally:
        if listener is not None:
            listener.close()
        for rank in ranks:
            rank.process.end()


def node_rank(parallel: ParallelConfig) -> int:
    """Which of the job's hosts this is, from NODE_RANK or SLURM_NODEID; 0 where there is only one."""
    if parallel.nodes == 1:
        return 0
    return int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")))


def check_gpus(parallel: ParallelConfig, gpus: int | None) -> None:
    """ConfigError where a node would have more ranks than its ``gpus``; None, on the CPU, is no limit."""
    ranks = parallel.world_size // parallel.nodes
    if gpus is not None and ranks > gpus:
        raise ConfigError(
            f"training.parallel.world_size={parallel.world_size} on training.parallel.nodes={parallel.nodes} is "
            f"{ranks} ranks a node, but {gpus} GPUs are visible on this one; give world_size={parallel.nodes * gpus}, "
            "or take more nodes"
        )


def _forks() -> bool:
    return sys.platform == "linux" and not any_driver()


def _running_server(env: Mapping[str, str] | None) -> RankServer:
    """This process's server, started with the environment of the first call; a new one where it has ended."""
    global _server
    with _server_lock:
        if _server is not None and not _server.alive:
            _server.close()
            _server = None
        _server = _server or RankServer(PRELOAD, {**os.environ, **(env or {})})
        return _server


def _listen() -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    return listener


def _variables(
    parallel: ParallelConfig, local_rank: int, threads: int, listener: socket.socket | None
) -> dict[str, str]:
    here = parallel.world_size // parallel.nodes
    node = node_rank(parallel)
    variables = {
        "WORLD_SIZE": str(parallel.world_size),
        "RANK": str(node * here + local_rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(here),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron orders its kernels and transfers by this
    }
    if listener is not None:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        if os.path.exists("/sys/class/net/lo"):
            variables["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name may not resolve
        if local_rank == 0:
            variables[STORE_FD] = str(listener.fileno())
        else:
            variables[STORE_FD] = ""
        return variables
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(f"training.parallel.nodes={parallel.nodes} needs the variable {name}")
    return variables


def _start(
    module_args: Sequence[str],
    variables: dict[str, str],
    log_dir: Path,
    store: socket.socket | None,
    server: RankServer | None,
) -> _Rank:
    number = int(variables["RANK"])
    log = log_dir / f"rank-{number}.log"
    process: _StartedRank | ForkedRank
    with log.open("wb") as output:
        if server is not None:
            process = server.fork(module_args, variables, output, store)
        else:
            process = _start_process(module_args, variables, output, store)
    return _Rank(number=number, process=process, log=log)


def _start_process(
    module_args: Sequence[str], variables: dict[str, str], output: IO[bytes], store: socket.socket | None
) -> _StartedRank:
    return _StartedRank(
        [sys.executable, "-m", *module_args],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[store.fileno()] if store is not None else [],
        preexec_fn=dies_with_this_process() if sys.platform == "linux" else None,
    )


def _watch(ranks: list[_Rank], deadline: float, deadline_s: float) -> None:
    while True:
        codes = [rank.process.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return
        if STOPPED in codes:
            raise SystemExit(STOPPED)
        if any(code not in (None, 0) for code in codes):
            time.sleep(_OTHERS_MAY_FAIL_S)
            raise LaunchError(_describe(*_culprit(ranks)))
        if time.monotonic() > deadline:
            late = next(rank for rank in ranks if rank.process.poll() is None)
            raise LaunchError(f"not finished after {deadline_s:.0f} s; rank {late.number}: {_tail(late)}")
        time.sleep(_POLL_S)


def _stop(ranks: list[_Rank]) -> None:
    """Ask the ranks to stop, and wait until all have; not where one has failed, or has not begun."""
    deadline = time.monotonic() + _STOP_DEADLINE_S
    with contextlib.suppress(RankServerError):
        for rank in ranks:
            if rank.process.poll() is None and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, signal.SIGTERM)
        while time.monotonic() < deadline and all(rank.process.pid is not None for rank in ranks):
            codes = [rank.process.poll() for rank in ranks]
            if None not in codes or any(code not in (None, 0, STOPPED) for code in codes):
                return
            time.sleep(_POLL_S)


def _culprit(ranks: list[_Rank]) -> tuple[_Rank, int]:
    """The failed rank that most likely failed by itself: killed, or not for want of a peer. And its code."""

    def key(failed: tuple[_Rank, int]) -> tuple[bool, bool]:
        rank, code = failed
        victim = any(sign in _read_tail(rank.log) for sign in _LOST_PEER)
        return (victim and code >= 0, code >= 0)

    return min(((rank, code) for rank in ranks if (code := rank.process.poll())), key=key)


def _describe(rank: _Rank, code: int) -> str:
    how = f"exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += " (out of memory?)"
    return f"rank {rank.number} failed: {how}; {_tail(rank)}"


def _tail(rank: _Rank) -> str:
    text = _read_tail(rank.log)
    return f"the end of {rank.log}:\n{text}" if text else f"{rank.log} is empty"


def _read_tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
