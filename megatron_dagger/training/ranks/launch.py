"""Starts the ranks of a job on this host, waits for them, and leaves none behind.

The ranks are processes with torchrun's variables. On a host without a GPU they are forked off a ``RankServer`` that
lives as long as this process; else they are started one by one, because CUDA's libraries do not survive a fork. Rank 0
inherits a socket that already listens, so no other process can take the port. On several hosts: run the same call on
each, with NODE_RANK (or SLURM_NODEID), MASTER_ADDR and MASTER_PORT set.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.gpus import any_driver, visible_gpus
from megatron_dagger.signals import parent_death_hook
from megatron_dagger.training.ranks.forkserver import STORE_FD, RankServer, RankServerError
from megatron_dagger.training.ranks.watch import LaunchError, Rank, StartedRank, stop_ranks, wait_for_ranks

PROCESSORS_PER_RANK = 4  # below, launching kernels and reading data may keep a GPU waiting
PRELOAD = ("megatron_dagger.training.trainer", "zarr")  # modules that the RankServer imports in advance

logger = logging.getLogger(__name__)
_server: RankServer | None = None
_server_lock = threading.Lock()


def warm_up(env: Mapping[str, str] | None = None) -> None:
    """Start importing the ranks' modules in the background; do nothing on a host with a GPU."""
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
    """Run ``python -m *module_args`` once for each of this host's ranks; return when all have exited with 0.

    Each rank writes to ``log_dir/rank-N.log``. ``threads`` are OpenMP's per rank; ``env`` are further variables. If a
    rank fails, after ``deadline_s`` seconds, or if this process is interrupted or killed, all ranks are killed.
    Raises LaunchError, and ConfigError for ranks that this host cannot have.

    If a signal handler raises SystemExit, the ranks are sent SIGTERM and may end by themselves first. If a rank ends
    with exit code STOPPED, a signal asked it to: SystemExit(STOPPED) is raised here.
    """
    gpus = visible_gpus({**os.environ, **(env or {})})
    check_gpus(parallel, gpus)
    if gpus is not None:
        warn_of_few_processors(parallel, len(os.sched_getaffinity(0)))
    log_dir.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    listener = _listen() if parallel.nodes == 1 else None
    try:
        server = _running_server(env) if _forks() else None
        for local_rank in range(parallel.ranks_per_node):
            variables = {**os.environ, **_variables(parallel, local_rank, threads, listener), **(env or {})}
            store = listener if local_rank == 0 else None
            ranks.append(_start(module_args, variables, log_dir, store, server))
        wait_for_ranks(ranks, deadline_s)
    except SystemExit:
        stop_ranks(ranks)
        raise
    except RankServerError as error:
        raise LaunchError(str(error)) from error
    finally:
        if listener is not None:
            listener.close()
        for rank in ranks:
            rank.process.end()


def node_rank(parallel: ParallelConfig) -> int:
    """Return which of the job's hosts this is, from NODE_RANK or SLURM_NODEID; 0 if there is only one."""
    if parallel.nodes == 1:
        return 0
    return int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")))


def check_gpus(parallel: ParallelConfig, gpus: int | None) -> None:
    """Raise ConfigError if a node would have more ranks than ``gpus``; None (on the CPU) sets no limit."""
    ranks = parallel.ranks_per_node
    if gpus is not None and ranks > gpus:
        raise ConfigError(
            f"training.parallel.world_size={parallel.world_size} on training.parallel.nodes={parallel.nodes} is "
            f"{ranks} ranks per node, but {gpus} GPUs are visible on this one; set world_size={parallel.nodes * gpus}, "
            "or use more nodes"
        )


def warn_of_few_processors(parallel: ParallelConfig, processors: int) -> None:
    """Log a warning if a node's ranks have fewer than PROCESSORS_PER_RANK processors each."""
    ranks = parallel.ranks_per_node
    if processors < PROCESSORS_PER_RANK * ranks:
        logger.warning(
            "%d processors for %d ranks of a GPU each: they will wait for them; ask SLURM for all of the node "
            "(--exclusive, or --cpus-per-task)",
            processors,
            ranks,
        )


def _forks() -> bool:
    return sys.platform == "linux" and not any_driver()


def _running_server(env: Mapping[str, str] | None) -> RankServer:
    """Return this process's server; start it with the environment of the first call, and anew if it has ended."""
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


def gpu_variables() -> dict[str, str]:
    """Return the variables that a process needs which trains on a GPU."""
    return {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron relies on it for the order of kernels and transfers
        # Rows of any length would fragment the memory
        "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        # To resume a round of fp8_delayed. Only a round's own checkpoint is loaded so, never one from elsewhere.
        "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE": "1",
    }


def _variables(
    parallel: ParallelConfig, local_rank: int, threads: int, listener: socket.socket | None
) -> dict[str, str]:
    """Return a rank's variables; without a ``listener``, on several hosts, the address must be in the environment."""
    local_ranks = parallel.ranks_per_node
    variables = {
        "WORLD_SIZE": str(parallel.world_size),
        "RANK": str(node_rank(parallel) * local_ranks + local_rank),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_ranks),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **gpu_variables(),
    }
    if listener is not None:
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
        if os.path.exists("/sys/class/net/lo"):
            variables["GLOO_SOCKET_IFNAME"] = "lo"  # the host's own name may not resolve
        variables[STORE_FD] = str(listener.fileno()) if local_rank == 0 else ""
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
) -> Rank:
    number = int(variables["RANK"])
    log = log_dir / f"rank-{number}.log"
    with log.open("wb") as output:
        if server is not None:
            return Rank(number=number, process=server.fork(module_args, variables, output, store), log=log)
        return Rank(number=number, process=_start_process(module_args, variables, output, store), log=log)


def _start_process(
    module_args: Sequence[str], variables: dict[str, str], output: IO[bytes], store: socket.socket | None
) -> StartedRank:
    return StartedRank(
        [sys.executable, "-m", *module_args],
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=[store.fileno()] if store is not None else [],
        preexec_fn=parent_death_hook() if sys.platform == "linux" else None,
    )
