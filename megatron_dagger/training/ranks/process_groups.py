"""This rank's process groups, parallel layout, seeds and device.

The rank comes from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), whoever set them:
``launch``, torchrun or SLURM, on one host or several. Every collective has a time limit.
"""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed

from megatron_dagger.config import ConfigError, ParallelConfig
from megatron_dagger.training import compat, cpu_shim
from megatron_dagger.training.ranks.forkserver import STORE_FD

_stores: list[torch.distributed.Store] = []  # at most one: the rendezvous, kept for the process's next block
_joins = itertools.count()


@contextmanager
def process_groups(parallel: ParallelConfig, *, seed: int, timeout_s: float, threads: int) -> Iterator[torch.device]:
    """Initialise torch.distributed and Megatron's parallel state for the block; yield this rank's device.

    ``timeout_s`` limits every collective and the wait for the other ranks to start; ``threads`` are torch's on the CPU.
    Raises ConfigError if the number of started processes is not ``parallel.world_size``.
    """
    cpu = cpu_shim.install()
    compat.quiet()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size != parallel.world_size:
        raise ConfigError(
            f"{world_size} processes were started, but training.parallel.world_size={parallel.world_size}; "
            "make the two equal"
        )
    if cpu:
        torch.set_num_threads(threads)
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    _join(world_size, "gloo" if cpu else "nccl", timeout_s)
    try:
        _initialise_megatron(parallel, seed, timeout_s)
        yield device
    finally:
        _leave()


def is_rank_zero() -> bool:
    """Return whether this is the job's rank 0."""
    return torch.distributed.get_rank() == 0


def _join(world_size: int, backend: str, timeout_s: float) -> None:
    rank = int(os.environ.get("RANK", "0"))
    timeout = datetime.timedelta(seconds=timeout_s)
    if not _stores:
        _stores.append(_rendezvous(rank, world_size, timeout))
    store = torch.distributed.PrefixStore(f"join{next(_joins)}", _stores[0])
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _rendezvous(rank: int, world_size: int, timeout: datetime.timedelta) -> torch.distributed.Store:
    if world_size == 1 and "MASTER_PORT" not in os.environ:
        return torch.distributed.HashStore()
    descriptor = os.environ.get(STORE_FD) if rank == 0 else None
    return torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=int(descriptor) if descriptor else None,
    )


def _initialise_megatron(parallel: ParallelConfig, seed: int, timeout_s: float) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    virtual = parallel.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual and virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _leave() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
