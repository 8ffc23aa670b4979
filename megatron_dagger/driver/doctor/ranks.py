"""Check that the run's ranks find each other, on all nodes of the job, and how fast they exchange data.

The ranks are started as a training starts them. Each node's first rank also tries a lock that another node's rank
holds, since a file system may keep locks on each host for itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from megatron_dagger.config import ParallelConfig, build, to_dict
from megatron_dagger.driver.doctor.examination import Examination, Finding, ok, problem, skipped
from megatron_dagger.driver.doctor.machine import needs_gpus
from megatron_dagger.gpus import visible_gpus
from megatron_dagger.store.lock import LockedError, flocked

PROGRAM = "megatron_dagger.driver.doctor.ranks"  # this module, as each rank runs it
LAUNCH_DEADLINE_S = 100.0
COLLECTIVE_TIMEOUT_S = 60.0
GPU_BYTES, CPU_BYTES = 256 << 20, 8 << 20  # of the sum that is timed
REPEATS = 3


def ranks(examination: Examination) -> Finding:
    """Start this node's ranks and let all of them compute a sum."""
    from megatron_dagger.training.ranks.launch import launch

    parallel = examination.config.training.parallel
    if needs_gpus(examination) and visible_gpus(os.environ) is None:
        return skipped("no GPU is visible on this host")
    if parallel.nodes > 1 and not os.environ.keys() >= {"MASTER_ADDR", "MASTER_PORT"}:
        return skipped(f"needs a job of {parallel.nodes} nodes, with MASTER_ADDR and MASTER_PORT")
    folder = examination.work_dir / "ranks"
    folder.mkdir(exist_ok=True)
    program = [PROGRAM, json.dumps(to_dict(parallel)), str(folder)]
    logs = folder / f"logs-{examination.node}"
    try:
        launch(program, parallel, logs, LAUNCH_DEADLINE_S)
    except RuntimeError as error:
        return problem(
            str(error),
            "between nodes MASTER_ADDR must be reachable, and NCCL_SOCKET_IFNAME name the fast network "
            "(slurm/site.sh); NCCL_DEBUG=INFO shows what NCCL does",
        )
    if examination.node:
        return ok("joined those of the first node")
    answer = json.loads((folder / "answer.json").read_text())
    if answer["unlocked"]:
        return problem(
            "a node got a lock that another one holds",
            "the run directory must be on a file system with locks between hosts (Lustre: mounted with flock)",
        )
    return ok(
        f"{parallel.world_size} on {parallel.nodes} nodes by {answer['backend']}, "
        f"{answer['gib_per_s']:.1f} GiB/s in an all-reduce of {answer['bytes'] >> 20} MiB"
    )


def main() -> None:
    """One rank: join the others, add up, try the lock; rank 0 writes the answer."""
    import torch

    from megatron_dagger.training.ranks.process_groups import is_rank_zero, process_groups

    parallel, folder = build(ParallelConfig, json.loads(sys.argv[1])), Path(sys.argv[2])
    with process_groups(parallel, seed=0, timeout_s=COLLECTIVE_TIMEOUT_S, threads=1) as device:
        size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
        values = torch.ones(size // 4, device=device)
        torch.distributed.all_reduce(values)  # the first one connects the ranks
        if float(values[-1]) != parallel.world_size:
            raise RuntimeError(f"the sum over {parallel.world_size} ranks was {float(values[-1])}")
        began = time.monotonic()
        for _ in range(REPEATS):
            torch.distributed.all_reduce(values)
        float(values[-1])  # waits for the device
        seconds = (time.monotonic() - began) / REPEATS
        unlocked = torch.tensor([float(_gets_the_lock(folder / "lock"))], device=device)
        torch.distributed.all_reduce(unlocked)
        if is_rank_zero():
            answer = {
                "backend": torch.distributed.get_backend(),
                "bytes": size,
                "gib_per_s": size / seconds / (1 << 30),
                "unlocked": bool(unlocked),
            }
            (folder / "answer.json").write_text(json.dumps(answer))


def _gets_the_lock(path: Path) -> bool:
    """Return whether this rank, the first of another node than rank 0's, gets the lock that rank 0 holds."""
    import torch

    from megatron_dagger.training.ranks.process_groups import is_rank_zero

    gets = False
    with flocked(path, deadline_s=10.0) if is_rank_zero() else contextlib.nullcontext():
        torch.distributed.barrier()
        if os.environ["LOCAL_RANK"] == "0" and not is_rank_zero():
            with contextlib.suppress(LockedError), flocked(path, deadline_s=0.0):
                gets = True
        torch.distributed.barrier()
    return gets


if __name__ == "__main__":
    main()
