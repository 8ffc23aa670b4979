"""Fencing: only one incarnation of a run's processes may write, checked at every durable write.

The process that works on a run holds ``RUN/.lock``, which the kernel releases when the process dies. On a cluster
that is not enough. When a node is lost, SLURM restarts its job on another node, while the processes on the lost node
may live on, hold the lock and write. So the job's next incarnation (same SLURM_JOB_ID, higher SLURM_RESTART_COUNT)
takes the run over: it replaces the lock file and writes a new token to ``RUN/.fence``.

Invariant: a writer (``store.atomic``, metrics) holds ``.fence`` shared while it compares the token with its own and
puts its work in place. A claim holds ``.fence`` exclusively while it changes the token. So an earlier incarnation
writes nothing after a claim, however long its process was stopped: it raises FencedError and ends.

Workers that share a run hold ``.lock`` shared, and each has its own ``.lock-NAME`` and ``.fence-NAME``. They are the
rollout workers and the trainer beside resident workers.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dagger.store.errors import StoreError
from megatron_dagger.store.lock import LockedError, flocked, name_holder, this_process

CLAIM_TIMEOUT_S = 5.0  # short: a second process on a run is an error, not a queue
VARIABLE = "MEGATRON_DAGGER_INCARNATION"  # passes the driver's tokens to the ranks of a training

_FENCE_DEADLINE_S = 60.0  # a fence is held only during one rename
_POLL_S = 0.05


class FencedError(StoreError):
    """Another process has taken the run over, so this one must not write."""


@dataclass(frozen=True)
class _Claim:
    """A right to write below ``run_dir``, valid as long as the file ``fence`` holds ``token``."""

    run_dir: Path
    fence: Path
    token: str


_claims: list[_Claim] = []  # of this process


@contextmanager
def claim(
    run_dir: Path, *, worker: str | None = None, take_over: bool = False, deadline_s: float = CLAIM_TIMEOUT_S
) -> Iterator[str]:
    """Hold a run exclusively, or as ``worker`` beside other workers. Yield the value of VARIABLE for ``inherit``.

    If another process holds the run, LockedError is raised after ``deadline_s`` seconds. If that process is an earlier
    incarnation of this SLURM job, or if ``take_over`` is set, it is fenced off instead: it can no longer write.
    """
    with ExitStack() as stack:
        claims = [_enter(stack, run_dir, "", shared=worker is not None, take_over=take_over, deadline_s=deadline_s)]
        if worker is not None:
            claims.append(
                _enter(stack, run_dir, f"-{worker}", shared=False, take_over=take_over, deadline_s=deadline_s)
            )
        yield json.dumps({held.fence.name: held.token for held in claims})


def inherit(run_dir: Path, environment: Mapping[str, str]) -> None:
    """Bind this process to the claim of the driver that started it, if ``environment`` names one."""
    if VARIABLE in environment:
        tokens: dict[str, str] = json.loads(environment[VARIABLE])
        _claims.extend(_Claim(run_dir.absolute(), run_dir / name, token) for name, token in tokens.items())


def this_job() -> dict[str, Any]:
    """Return this process's SLURM job, its restart count and its node; an empty dict outside of SLURM."""
    if "SLURM_JOB_ID" not in os.environ:
        return {}
    return {
        "job": os.environ["SLURM_JOB_ID"],
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "node": os.environ.get("SLURMD_NODENAME"),
    }


@contextmanager
def permitted(path: str | os.PathLike[str]) -> Iterator[None]:
    """Permit the block to put ``path`` in place. Raises FencedError if another process has taken its run over."""
    absolute = Path(path).absolute()
    with ExitStack() as stack:
        for held in [held for held in _claims if absolute.is_relative_to(held.run_dir)]:
            descriptor = stack.enter_context(flocked(held.fence, shared=True, deadline_s=_FENCE_DEADLINE_S))
            record = _read(descriptor)
            if record.get("token") != held.token:
                raise FencedError(
                    f"{held.run_dir}: {record.get('holder', 'another process')} has taken this run over; "
                    f"{path} was not written, and this process must end"
                )
        yield


def _enter(stack: ExitStack, run_dir: Path, suffix: str, *, shared: bool, take_over: bool, deadline_s: float) -> _Claim:
    """Take a lock file and its fence until ``stack`` closes, and register the claim."""
    lock, fence = run_dir / f".lock{suffix}", run_dir / f".fence{suffix}"
    end = time.monotonic() + deadline_s
    while True:
        with flocked(fence, deadline_s=_FENCE_DEADLINE_S) as descriptor:
            record = _read(descriptor)
            takes = _is_my_predecessor(record) or (take_over and not shared)
            if takes:
                lock.unlink(missing_ok=True)  # its holder keeps a lock on a file that no longer counts
            try:
                held = stack.enter_context(flocked(lock, shared=shared, deadline_s=0.0))
            except LockedError as error:
                if time.monotonic() > end:
                    raise LockedError(
                        f"{run_dir} is in use by {error.holder}. End that first or, if it cannot be reached, take the "
                        f"run over with `megatron-dagger run {run_dir} --take-over`",
                        holder=error.holder,
                    ) from None
            else:
                name_holder(held)
                joins = shared and not takes and "token" in record
                token = record["token"] if joins else uuid.uuid4().hex
                if not joins:  # jobs that share a run do not succeed each other
                    job = this_job() if takes or not shared else {}
                    _write(descriptor, {"token": token, "holder": this_process(), **job})
                break
        time.sleep(_POLL_S)
    new_claim = _Claim(run_dir.absolute(), fence.absolute(), token)
    _claims.append(new_claim)
    stack.callback(_claims.remove, new_claim)
    return new_claim


def _is_my_predecessor(record: dict[str, Any]) -> bool:
    mine = this_job()
    return bool(mine) and record.get("job") == mine["job"] and record["restart"] < mine["restart"]


def _read(descriptor: int) -> dict[str, Any]:
    """Return the fence's record. A record that a kill cut short reads as empty, which matches nobody's token."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)
    os.fsync(descriptor)
